"""The audit of an image set: copies across splits, classes that a shortcut tells, and images that hold nothing.

`audit` is the command. `image_signatures` reads every file once; `near_duplicates` finds copies among the signatures
(`thumbnail_views` for candidates, `alignment` for their pixels) and `duplicate_groups` joins them; `shortcut_probes`
classifies by borders, background and file properties alone; `affected_scores` scores models without the test images
that have a copy in train or val; `clean_split` proposes a split that keeps each group on one side.
"""
