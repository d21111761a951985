"""Many pictures: prompt sets, batch runs, their report, and the command line. Stands above the pipeline."""
