"""Scores, ranks and reports members and ensembles.

Steps
    `evaluate` gathers (`evaluation_inputs` reads every record and array once), computes (`evaluation_results`,
    `score_records` and `score_ranking` touch no file) and writes records, then the report. Ensembles' predictions on
    the evaluated rows, and latencies that were never measured, are made while inputs are gathered, and stored.

Intervals
    2,000 stratified bootstrap samples are rows of counts, so that every metric of every sample is a matrix product;
    whole groups are drawn if `dataset.group_regex` or equal images form groups. All models are scored on the same
    samples, so differences are paired. Intervals are percentiles, with three exceptions: an accuracy of 1 or 0 has
    its exact binomial bound; calibration errors, which resampling inflates, are reflected; areas under curves use the
    influence of each row (DeLong et al. 1988). McNemar's test is exact; Holm's correction covers all ranked models.

Conformal sets and abstention
    A set holds the classes whose score is at most `threshold` (LAC: 1 - p; APS: the summed probability of the classes
    at least as probable, without randomisation) and always the most probable class. Thresholds come from the
    validation rows of `crossfit.npz`. `selective.threshold` is the lowest confidence above which validation rows meet
    the target selective risk. The validation split chose the members' epochs, which makes thresholds slightly
    optimistic.

Latency
    The sum of the members' networks, run one after another, and the combiner, from `latency.json`. The p95 is the sum
    of the parts' and therefore conservative.

Contamination
    Rows whose content equals that of a training or validation image are left out for all models alike. A model that
    was fitted on an evaluated row is marked `contaminated`, never ranked, and refused by name with exit code 3.

Report
    The page shows what the evaluation holds in memory; one that is missing beside a current ranking is made of the
    stored records (`report_sources`). Its key, a digest of the records that it shows, is in its head, and a page with
    the same key is not written again. It has no script and a content security policy that forbids requests; every
    value is made printable and escaped on its way in. Colours are CSS variables, so that figures follow light, dark
    and print.
"""
