"""The audit of an image set: copies across splits, shortcuts to the classes, and empty images.

`audit` is the command. `image_signatures` reads every file once; `near_duplicates` finds copies among the signatures
(`thumbnail_views` for candidates, `alignment` for their pixels) and `duplicate_groups` joins them; `shortcut_probes`
classifies by only borders, background or file properties; `affected_scores` scores models without the test images
that have a copy in train or val; `clean_split` proposes a split that keeps each group on one side.
"""
