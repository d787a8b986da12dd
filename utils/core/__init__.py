"""Configuration, workspace folders, atomic files, locks and worker processes; knows no array operations and no network.

Every file is written under a temporary name and renamed; where several belong together the record comes last. Records
are JSON with sorted keys, arrays `.npy` and `.npz` without pickled objects, parameters `.safetensors`. Digests of
files are cached by size, modification time and inode, so that a command finds its result present without torch.

`--output DIR` (or `DBT_ENSEMBLE_DIR`) receives everything that this project writes; the workspace is then only read.
A command that writes holds `ensembles/.lock` (host, boot, process id, start time, command), created by a hard link.
The lock of an owner that is certainly dead is taken over with a message; any other owner is named and left.
`cache.quota_gb` bounds the decoded images and their embeddings that are kept from one command to the next.
"""
