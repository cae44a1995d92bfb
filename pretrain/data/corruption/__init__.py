"""What objectives do to rows of tokens. Each is a pure function of (tokens, keys, settings): a row's corruption depends
on its own key and on nothing else, so ranks, workers and batches do not change it."""
