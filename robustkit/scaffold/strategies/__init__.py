"""What `robustkit new KIND NAME` starts from: for each kind a small strategy that works, in a file of the kind's name.

These files are read, never imported: `robustkit.scaffold` writes them with the new strategy's names.
"""
