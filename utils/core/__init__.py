"""Configuration, workspace folders, atomic files, locks and worker processes; no array operations and no networks.

Every file is written under a temporary name and renamed; if several belong together, the record is written last.
Records are JSON with sorted keys, arrays `.npy` and `.npz` without pickled objects, parameters `.safetensors`. Digests
of files are cached by size, modification time and inode, so that a command can find an existing result without torch.

With `--output DIR` (or `DBT_ENSEMBLE_DIR`), everything that this project writes goes there; the workspace is then only
read. A command that writes holds `ensembles/.lock` (host, boot, process id, start time, command), created by a hard
link. The lock of an owner that is certainly dead is taken over with a message; otherwise the command fails with the
owner's name. `cache.quota_gb` limits the decoded images and embeddings that are kept between commands.
"""
