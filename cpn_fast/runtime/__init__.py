"""Code that every module may use: errors, files, processes, the terminal."""
