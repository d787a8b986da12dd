"""Finds trained networks and imported predictions, checks them and writes the catalog.

A scan reads names, records and, once per content, what a checkpoint records about itself; with known digests it does
not import torch. The first of `final`, `finetune_best` and `head_best` is the member; fold networks, later epochs and
other stages are listed with it. Derived members (soups, snapshots, students) are used only if `backbones.include`
names them. Classes come from the checkpoint, else from the sorted class folders, and are checked against the width of
the classifier and `class_mapping.json`. Extra output units are a warning until a pass over the validation split shows
whether the network ever predicts them.

Networks of timm are declared by the user (`declarations`): by a file of weights, a folder with `config.json`, or a
repository of the hub. Class lists are matched by name; the preprocessing comes from the user, the file or folder, or
timm (`preprocessing_sources`). The network is built and run on a blank image before anything is written. The catalog
keeps what only the files record, so that later scans read the weights' file alone. An assumed preprocessing is compared
with other common rules on val (`preprocessing_checks`), which recommends and never changes.

What the weights of a declared network were trained on is stated (`training_statements`), never assumed: without a
statement it is unknown. A statement is kept as long as the content of the checkpoint is the same.

Imported predictions (`DIR/<member>/{oof,val,test,train}.npz`) and the base pipeline's out-of-fold files pass the same
parser. Out-of-fold rows that equal those of `train.npz` on more than 1% are refused (on more than half if the model
has fewer distinct outputs than rows, as nearest neighbours do). The training data of the networks behind imported
files is unknown, so training rows count as fitted on and validation rows as selected on. Before members are replaced,
the catalog is written without them, and at the end with them.

Names of new members follow one rule (`member_names`): a letter or digit and at most 99 letters, digits, `_`, `.` and
`-`, no suffix of a file, no name that an ensemble or derived member may have, unique regardless of case. `renaming`
gives the files of a member a second name by hard links, changes the catalog in one write and then removes the first
names.
"""
