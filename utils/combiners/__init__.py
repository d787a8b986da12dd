"""Combiners of the members' outputs: `fit`, `predict_proba`, `to_module`, `state`.

Weights
    Convex and log-linear weights have the least log-loss or Brier score; a duality gap bounds how much better any
    other weights can be. The ridge penalty acts on the distance of the weights from their mean, so a log-linear pool
    keeps its free sum, its inverse temperature. That sum has a Gamma(2, 1) prior, as has every temperature: rows that
    are all correct make an ensemble more confident, but never certain. Folds of the rows given to `fit` choose the
    strength of the penalty, the pool (linear unless log-linear is better by more than one standard error) and, for
    accuracy and macro F1, whether members added greedily are kept. A temperature is kept only if held-out log-loss
    falls.
    The convex pool of a fuser has a lasso in place of the ridge: it acts on the weights of all inputs but the best, so
    that few inputs join it.

Votes
    Soft and hard voting and logit averaging keep the members' raw probabilities. `calibrated_votes` has the same votes
    and the best single member with a temperature: what learned ensembles are compared with.

Doubt
    `fit`, `predict_proba` and `to_module` belong to the base class, which mixes whatever a fit on n rows gives with the
    uniform distribution (`utils.numeric.uniform_mixture`); a family defines `_fit`, `_predict_proba` and `_to_module`.
    Each cross-fitted copy has the weight of its own number of rows. Votes fit nothing and are not mixed.

Selection and pruning
    Greedy selection (Caruana et al. 2004) takes the fewest members whose held-out loss is within one standard error
    of the lowest. Pruning searches subsets within limits on latency and size; each size is scored on held-out folds,
    and the cross-fitted copies repeat the search. No member is added for diversity alone if its accuracy is below
    half-way from the most frequent class to the best member, or if it makes the mean right on fewer rows by more than
    one paired standard error.

Trees
    Log-probabilities are rounded to steps of 1/64, since trees put thresholds where rows lie and the last bit of a
    number would otherwise decide in another runtime. Boosters train on one thread: XGBoost's bytes depend on the
    number.

Sparse combiners
    `route(logits, has_run)` names the members that each row needs next; `predict_proba` reads nothing else, so
    `routing.run_sparse` fills what has not run with zeros and gets the same bytes. The exported modules of
    `routing_heads` compute every member's weight, 0 where it is not needed, without data-dependent control flow.

Fusion
    A combiner that reads embeddings gets the members' logits and embeddings; its module takes `(logits, embeddings)`.
    Centres, principal axes (above 1,024 numbers in all) and shared variates (MAXVAR generalised CCA in closed form,
    with Ledoit and Wolf's ridge) read no labels and are fitted once on all rows of a fit.
"""
