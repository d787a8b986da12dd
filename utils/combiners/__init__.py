"""Combiners of the members' outputs: `fit`, `predict_proba`, `to_module`, `state`.

Weights
    Convex and log-linear weights minimise the log-loss or Brier score; a duality gap bounds how much better any other
    weights can be. The ridge penalty acts on the distance of the weights from their mean, so that the sum of log-linear
    weights, an inverse temperature, stays free. That sum has a Gamma(2, 1) prior, as has every temperature: if all rows
    are correct, an ensemble becomes more confident, but no probability becomes 1. Folds of the rows given to `fit`
    select the strength of the penalty, the pool (linear unless log-linear is better by more than one standard error)
    and, for accuracy and macro F1, whether greedily added members are kept. A temperature is kept only if the held-out
    log-loss falls.
    The convex pool of a fuser has a lasso instead of the ridge: it acts on the weights of all inputs but the best, so
    that few inputs have weight.

Votes
    Soft and hard voting and logit averaging keep the members' raw probabilities. `calibrated_votes` has the same votes
    and the best single member with a temperature; learned ensembles are compared with them.

Mixture with the uniform distribution
    `fit`, `predict_proba` and `to_module` belong to the base class, which mixes the probabilities of a fit on n rows
    with the uniform distribution (`utils.numeric.uniform_mixture`); a family defines `_fit`, `_predict_proba` and
    `_to_module`. The weight for a cross-fitted copy depends on its number of rows. Votes fit nothing and are not mixed.

Selection and pruning
    Greedy selection (Caruana et al. 2004) takes the fewest members whose held-out loss is within one standard error
    of the lowest. Pruning searches subsets within limits on latency and size; each size is scored on held-out folds,
    and the cross-fitted copies repeat the search. No member is added for diversity alone if its accuracy is below
    the midpoint between the most frequent class and the best member, or if it lowers the accuracy of the mean by more
    than one paired standard error.

Trees
    Log-probabilities are rounded to multiples of 1/64: trees place thresholds at the values of rows, where differences
    between runtimes in the last bit would otherwise change predictions. Boosters train on one thread, since XGBoost's
    bytes depend on the number of threads.

Sparse combiners
    `route(logits, ran)` returns the members that each row needs next. `predict_proba` reads no others, so that
    `routing.run_sparse` fills the logits of members that have not run with zeros and gets the same bytes. The exported
    modules of `routing_heads` compute every member's weight, 0 where it is not needed, without data-dependent control
    flow.

Fusion
    A combiner that reads embeddings gets the members' logits and embeddings; its module takes `(logits, embeddings)`.
    Centres, principal axes (above 1,024 dimensions in total) and shared variates (MAXVAR generalised CCA in closed
    form, with Ledoit and Wolf's shrinkage) read no labels and are fitted once on all rows of a fit.
"""
