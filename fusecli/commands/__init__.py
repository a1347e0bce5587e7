"""What the commands do on files, one function each: the steps of the pipeline in a row."""
