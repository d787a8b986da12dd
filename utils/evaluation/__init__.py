"""Scores and ranks members and ensembles; `report` writes the HTML page, `trackers` log to MLflow and TensorBoard.

Steps
    `evaluate` gathers (`evaluation_inputs` reads every record and array once), computes (`evaluation_results`,
    `score_records`, `uncertainty_scores` and `score_ranking` access no file) and writes records, then the report.
    Missing predictions of ensembles on the evaluated rows, and missing latencies, are computed and stored while inputs
    are gathered.

Intervals
    Rows of one group (`dataset.group_regex`, groups of a manifest, equal images) are not independent: losses are summed
    by group before any standard error, and tests exchange whole groups. Accuracies have Wilson's interval, mean losses
    a t interval corrected for skewness, paired differences of accuracies that of Agresti and Min. F1, precision,
    recall and areas under curves have Wilson's interval for the number of rows that corresponds to the variance of
    2,000 stratified bootstrap samples (rows of counts, so that the metrics of all samples are matrix products);
    calibration errors, which resampling inflates, have reflected intervals. Rates of single classes have Wilson's
    interval; the intervals of their areas, and DeLong's test of two models' areas, use the influences of the rows. With
    too few rows, groups, errors or rows of a class, an interval is left out with a note. McNemar's test, and the
    sign-flip test of groups, are exact; Holm's correction covers all ranked models.

Conformal sets and abstention
    A set contains the classes whose score is at most `threshold` (LAC: 1 - p; APS: the summed probability of the
    classes at least as probable; RAPS: APS with a random part, seeded by the image's content, and a penalty) and always
    the most probable class. Thresholds are fitted on the validation rows of `crossfit.npz`; with groups each group has
    the same weight. `selective.threshold` keeps the target selective risk with 95% confidence, by fixed-sequence
    testing. Since the validation split selected the members' epochs, thresholds are slightly optimistic.

Latency
    The sum of the latencies of the members' networks, run one after another, and of the combiner, from `latency.json`.
    The p95 is the sum of the p95 of all parts and therefore conservative.

Contamination
    Rows whose content equals that of a training or validation image are left out for all models. A model that was
    fitted on an evaluated row is marked `contaminated`, never ranked, and refused by name with exit code 3.
"""
