"""What is asked, in the model's terms: text and pictures to rows of ids, sizes to grids, masks to kept tokens."""
