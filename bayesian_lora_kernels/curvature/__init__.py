"""From a loader to the curvature: likelihoods, Kronecker factors, EKFAC eigenvalues, passes over the data."""
