// The eigendecomposition of a Nystroem approximation, in the coordinates of its sketch: the small matrices of one
// incremental SVD update.
//
// Given a sketch Y = A Omega of a positive semidefinite A, with C = Omega^T A Omega and K = Y^T Y, it finds W so that
// Y W has orthogonal columns by descending norm, and Y W (Y W)^T = Y C^+ Y^T, the Nystroem approximation of A (Frangella,
// Tropp and Udell 2021): W = P R, where P = D V diag(e)^(-1/2) whitens C, D C D (unit diagonal) = V diag(e) V^T with the
// eigenvalues that are rounding left out, and R diagonalises P^T K P. `nystrom_eigh` in
// bayesian_lora_kernels/ops/incremental_svd/reference.py is the same in PyTorch.
//
// R is never formed: the second diagonalisation starts with P in place of the identity and turns it into P R.
#pragma once

#include "small_eigh.h"

namespace blk {

constexpr int kTile = 4;  // rows and columns of a product that a thread sums in registers

// A kTile x kColumns part of the product: rows i, i + 1, ..., columns j, j + lanes, ...
template <int kColumns, typename Team>
BLK_HD void multiply_tile(const Team& team, const double* __restrict__ a, const double* __restrict__ b,
                          double* __restrict__ to, int n, int i, int j) {
  double sums[kTile][kColumns] = {};
  const double* rows[kTile];
  for (int r = 0; r < kTile; ++r) rows[r] = a + (i + r < n ? i + r : n - 1) * n;
  for (int m = 0; m < n; ++m) {
    const double* __restrict__ b_row = b + m * n + j;
    for (int r = 0; r < kTile; ++r) {
      for (int c = 0; c < kColumns; ++c) sums[r][c] += rows[r][m] * b_row[c * team.lanes()];
    }
  }
  for (int r = 0; r < kTile && i + r < n; ++r) {
    for (int c = 0; c < kColumns; ++c) to[(i + r) * n + j + c * team.lanes()] = sums[r][c];
  }
}

// to = a b, all n x n row-major. Ends with a barrier.
template <typename Team>
BLK_HD void multiply(const Team& team, const double* __restrict__ a, const double* __restrict__ b,
                     double* __restrict__ to, int n) {
  for (int i = kTile * team.row(); i < n; i += kTile * team.rows()) {
    int j = team.lane();
    for (; j + (kTile - 1) * team.lanes() < n; j += kTile * team.lanes()) multiply_tile<kTile>(team, a, b, to, n, i, j);
    for (; j < n; j += team.lanes()) multiply_tile<1>(team, a, b, to, n, i, j);
  }
  team.sync();
}

// How many doubles the team needs beside the vectors: the eigensolver's, and the n of `scale`.
BLK_HD constexpr int nystrom_eigh_size(int n) { return workspace_size(n) + n; }

// `core`: C, of which only the lower triangle is read; `gram`: K; `combination`: W; `scratch`; all n x n row-major.
// Eigenvalues up to max(rounding, n eps) times the largest count as zero. `scale`: n numbers. Returns the number of
// sweeps of both diagonalisations; or kNotFinite (NaN, infinity or overflow), with NaN in W; or kNotConverged.
template <typename Team>
BLK_HD int nystrom_eigh(const Team& team, const double* __restrict__ core, const double* __restrict__ gram,
                        double rounding, double* __restrict__ combination, double* __restrict__ scratch,
                        double* __restrict__ scale, const Workspace<double>& w, int n) {
  // D C D. Its threshold compares directions, not sizes: a massive activation does not wipe out the others.
  for (int i = team.rank(); i < n; i += team.size()) {
    const double square = core[i * n + i];
    scale[i] = square > 0 ? 1 / sqrt(square) : 0.0;
  }
  team.sync();
  for (int i = team.row(); i < n; i += team.rows()) {
    for (int j = team.lane(); j <= i; j += team.lanes()) combination[i * n + j] = core[i * n + j] * scale[j] * scale[i];
  }
  set_vectors_to_identity(team, w, n);
  team.sync();
  if (team.any(!load_lower(team, combination, w, n))) {
    fill(team, combination, double(NAN), n * n);
    return kNotFinite;
  }
  const int first = diagonalise(team, w, combination, n);

  // P^T as rows in place of the eigenvectors, P in `combination`
  double largest = 0;
  for (int i = 0; i < n; ++i) largest = fmax(largest, w.diagonal[i]);
  const double threshold = fmax(rounding, n * kEps<double>) * largest;
  for (int i = team.row(); i < n; i += team.rows()) {
    const double value = w.diagonal[i];
    const double inverse_root = value > threshold ? 1 / sqrt(value) : 0.0;
    for (int j = team.lane(); j < n; j += team.lanes()) {
      const double p = scale[j] * w.vectors[i * n + j] * inverse_root;
      w.vectors[i * n + j] = p;
      combination[j * n + i] = p;
    }
  }
  team.sync();

  multiply(team, gram, combination, scratch, n);
  multiply(team, w.vectors, scratch, combination, n);
  if (team.any(!load_lower(team, combination, w, n))) {
    fill(team, combination, double(NAN), n * n);
    return kNotFinite;
  }
  const int second = diagonalise(team, w, scratch, n);
  find_order(team, w, n);
  store_vectors(team, w, combination, n);
  return first < 0 || second < 0 ? kNotConverged : first + second;
}

}  // namespace blk
