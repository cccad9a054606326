"""The code that imports the tree under test: each module runs in its own process, and prints or writes its answer."""
