"""The stages of the chain: each reads the files of the one before and writes its own."""
