"""Finds trained networks and imported predictions, checks them and writes the catalog.

A scan reads names, records and, once per content, the metadata in checkpoints; if all digests are known, it does not
import torch. The first of `final`, `finetune_best` and `head_best` is the member; fold networks, later epochs and other
stages are listed with it. Derived members (soups, snapshots, students) are used only if `backbones.include` names them.
Classes come from the checkpoint, else from the sorted class folders, and are checked against the width of the
classifier and `class_mapping.json`. Extra outputs cause a warning until a pass over the validation split shows whether
the network ever predicts them.

timm networks are declared by the user (`declarations`): with a weights file, a folder with `config.json`, or a hub
repository. Class lists are matched by name; the preprocessing comes from the user, the file or folder, or timm
(`preprocessing_sources`). The network is built and run on a blank image before anything is written. The catalog stores
the metadata of the other files, so that later scans read only the weights file. An assumed preprocessing is compared
with other common rules on val (`preprocessing_checks`), which makes recommendations, but no changes.

The training data of a declared network is stated by the user (`training_statements`), never assumed: without a
statement it is unknown. A statement is kept as long as the content of the checkpoint does not change.

Imported predictions (`DIR/<member>/{oof,val,test,train}.npz`) and the base pipeline's out-of-fold files use the same
parser. Out-of-fold predictions are refused if more than 1% of their rows equal those of `train.npz` (more than half if
the model has fewer distinct outputs than rows, like nearest neighbours). The training data of the networks behind
imported files is unknown, so training rows count as fitted on and validation rows as selected on. When members are
replaced, the catalog is first written without them, and at the end with them.

Names of new members follow one rule (`member_names`): a letter or digit and at most 99 letters, digits, `_`, `.` and
`-`, no file suffix, no name that an ensemble or derived member may have, unique regardless of case. `renaming` gives
the files of a member a second name by hard links, changes the catalog in one write and then removes the old names.
"""
