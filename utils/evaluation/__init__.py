"""Scores and ranks members and ensembles; `report` makes the page of it, and `trackers` hand it to other tools.

Steps
    `evaluate` gathers (`evaluation_inputs` reads every record and array once), computes (`evaluation_results`,
    `score_records`, `uncertainty_scores` and `score_ranking` touch no file) and writes records, then the report.
    Ensembles' predictions on the evaluated rows, and latencies that were never measured, are made while inputs are
    gathered, and stored.

Intervals
    Rows of one group (`dataset.group_regex`, groups of a manifest, equal images) are not independent: losses are summed
    by group before any standard error, and tests exchange whole groups. Accuracies have Wilson's interval, mean losses
    a t interval corrected for skewness, paired differences of accuracies that of Agresti and Min. F1, precision,
    recall and areas under curves have Wilson's interval for as many rows as give the variance of 2,000 stratified
    bootstrap samples (rows of counts, so that every metric of every sample is a matrix product); calibration errors,
    which resampling inflates, are reflected. Rates of single classes have Wilson's interval, their areas one from the
    influences of the rows, which also give DeLong's test of two models' areas. Where rows, groups, errors or rows of a
    class are too few, an interval is left out with a note. McNemar's test, and the sign-flip test of groups, are exact;
    Holm's correction covers all ranked models.

Conformal sets and abstention
    A set holds the classes whose score is at most `threshold` (LAC: 1 - p; APS: the summed probability of the classes
    at least as probable; RAPS: APS with a random part that the image's content decides, and a penalty) and always the
    most probable class. Thresholds come from the validation rows of `crossfit.npz`; with groups each group has the same
    weight. `selective.threshold` keeps the target selective risk with 95% confidence, by fixed-sequence testing. The
    validation split chose the members' epochs, which makes thresholds slightly optimistic.

Latency
    The sum of the members' networks, run one after another, and the combiner, from `latency.json`. The p95 is the sum
    of the parts' and therefore conservative.

Contamination
    Rows whose content equals that of a training or validation image are left out for all models alike. A model that
    was fitted on an evaluated row is marked `contaminated`, never ranked, and refused by name with exit code 3.
"""
