"""What imports the tree that is checked: each module runs in a process of its own, and prints or writes its answer."""
