"""The stages of the chain. Each one reads the files of the stage before it."""
