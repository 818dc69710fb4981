"""Who may ask, for how much: keys, limits over all ingress replicas, and the ledger of what was used."""
