"""Status, clean-up and debug runs of a workspace.

`status` reads only names, times and records, no checkpoints or images, does not import torch, and writes nothing. A
checkpoint or image has changed if its size, time or inode differs from the recorded one; in a moved workspace, if it is
newer than the catalog.

`clean` lists temporary files, predictions of members that no longer exist (by exact name; none without a readable
catalog), progress of finished trainings, with `--cache` the decoded images and with `--stale` stale ensembles;
`--confirm` removes them. Nothing behind a symbolic link is removed.

`debug` runs each section in a separate process in a sandbox: a synthetic workspace (sixteen images, three networks
trained by the bundled pipeline) or a separate output folder for the trained members. The table of sections is
`debug_plan.SECTIONS`.
"""
