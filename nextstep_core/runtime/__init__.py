"""The same numbers faster, smaller or elsewhere: every option is a file that can be deleted alone."""
