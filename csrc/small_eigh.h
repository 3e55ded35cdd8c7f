// Eigenvalues and eigenvectors of one small symmetric matrix, by two-sided cyclic Jacobi.
//
// One algorithm for host and device. It is written for a team of threads, rows() x lanes() of them: a CUDA block, or
// the single thread of `SerialTeam`, for which every team loop below is a plain loop that the compiler vectorises.
//
// Order of the rotations: odd-even. A round rotates the disjoint neighbours (0, 1), (2, 3), ... or (1, 2), (3, 4), ...
// and swaps each pair as it goes, so that n rounds bring every pair together once and leave the order reversed.
// Everything happens in place, needs no schedule, and serves odd n without padding. Every sweep starts with the
// diagonal sorted: equal eigenvalues then meet as neighbours, without which Jacobi loses its quadratic convergence on
// clusters (measured at n = 128 on four eigenvalues of multiplicity 32: 7 sweeps instead of 19).
//
// Accuracy: an off-diagonal element is negligible if |a_pq| <= eps sqrt(|a_pp a_qq|). Measured against its two diagonal
// elements and not against the norm, this keeps small eigenvalues of graded positive matrices accurate relative to
// themselves (Demmel and Veselic, "Jacobi's method is more accurate than QR", SIAM J. Matrix Anal. Appl. 13, 1992).
//
// Storage: the strictly lower triangle by rows, without gaps (half the memory, and all that a symmetric update needs),
// and the eigenvectors as rows, so that rotating two of them reads two contiguous rows.
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define BLK_HD __host__ __device__ __forceinline__
#else
#define BLK_HD inline
#endif

namespace blk {

constexpr int kMaxN = 128;      // largest matrix
constexpr int kMaxSweeps = 60;  // 6 to 14 are usual, 28 the most seen; what needs more is reported

// What `small_eigh` returns when it is not the number of sweeps.
constexpr int kNotFinite = -1;
constexpr int kNotConverged = -2;

// Powers of two, so that a product with them is exact and `negligible` is symmetric in p and q.
template <typename T>
constexpr T kEps = sizeof(T) == 8 ? T(0x1p-52) : T(0x1p-23);

struct SerialTeam {
  static constexpr int row() { return 0; }
  static constexpr int rows() { return 1; }
  static constexpr int lane() { return 0; }
  static constexpr int lanes() { return 1; }
  static constexpr int rank() { return 0; }
  static constexpr int size() { return 1; }
  static void sync() {}
  static bool any(bool condition) { return condition; }  // a team's `any` is also a barrier
};

// Where row i of the strictly lower triangle starts.
BLK_HD constexpr int packed_row(int i) { return i * (i - 1) / 2; }

// What a team works in, for an n x n matrix.
template <typename T>
struct Workspace {
  T* lower;     // [n (n - 1) / 2], the strictly lower triangle
  T* diagonal;  // [n]
  T* cosines;   // [n / 2], of the current round
  T* sines;     // [n / 2]
  T* vectors;   // [n, n], the eigenvectors as rows
  int* order;   // [n], which row of the matrix has the i-th largest diagonal element
};

// How many numbers of type T `make_workspace` takes from `memory`.
BLK_HD constexpr int workspace_size(int n) { return packed_row(n) + 2 * n; }

template <typename T>
BLK_HD Workspace<T> make_workspace(T* memory, T* vectors, int* order, int n) {
  T* diagonal = memory + packed_row(n);
  T* cosines = diagonal + n;
  return {memory, diagonal, cosines, cosines + n / 2, vectors, order};
}

template <typename T>
BLK_HD bool negligible(T off, T p, T q) {
  return fabs(off) <= kEps<T> * sqrt(fabs(p)) * sqrt(fabs(q));
}

template <typename Team, typename T>
BLK_HD bool is_diagonal(const Team& team, const Workspace<T>& w, int n) {
  bool diagonal = true;
  for (int i = team.row(); i < n && diagonal; i += team.rows()) {
    const T* row = w.lower + packed_row(i);
    for (int j = team.lane(); j < i; j += team.lanes()) diagonal &= negligible(row[j], w.diagonal[i], w.diagonal[j]);
  }
  return !team.any(!diagonal);
}

// Sorts by counting: the place of an element is the number of those that precede it.
template <typename Team, typename T>
BLK_HD void find_order(const Team& team, const Workspace<T>& w, int n) {
  for (int i = team.rank(); i < n; i += team.size()) {
    int place = 0;
    for (int j = 0; j < n; ++j) {
      place += w.diagonal[j] > w.diagonal[i] || (w.diagonal[j] == w.diagonal[i] && j < i);
    }
    w.order[place] = i;
  }
  team.sync();
}

// Renumbers matrix and vectors so that the diagonal descends. `scratch`: n * n numbers.
template <typename Team, typename T>
BLK_HD void sort_diagonal(const Team& team, const Workspace<T>& w, T* scratch, int n) {
  find_order(team, w, n);
  T* old_diagonal = scratch + packed_row(n);
  for (int i = team.rank(); i < packed_row(n); i += team.size()) scratch[i] = w.lower[i];
  for (int i = team.rank(); i < n; i += team.size()) old_diagonal[i] = w.diagonal[i];
  team.sync();
  for (int i = team.row(); i < n; i += team.rows()) {
    const int from_i = w.order[i];
    if (team.lane() == 0) w.diagonal[i] = old_diagonal[from_i];
    for (int j = team.lane(); j < i; j += team.lanes()) {
      const int from_j = w.order[j];
      w.lower[packed_row(i) + j] =
          scratch[from_i > from_j ? packed_row(from_i) + from_j : packed_row(from_j) + from_i];
    }
  }
  team.sync();
  for (int i = team.rank(); i < n * n; i += team.size()) scratch[i] = w.vectors[i];
  team.sync();
  for (int i = team.row(); i < n; i += team.rows()) {
    for (int j = team.lane(); j < n; j += team.lanes()) w.vectors[i * n + j] = scratch[w.order[i] * n + j];
  }
  team.sync();
}

// The rotations of one round, pair r being (2r + odd, 2r + odd + 1), and their effect on the pairs' own 2 x 2 blocks.
template <typename Team, typename T>
BLK_HD void rotate_pairs(const Team& team, const Workspace<T>& w, int pairs, int odd) {
  T* __restrict__ cosines = w.cosines;
  T* __restrict__ sines = w.sines;
  T* __restrict__ diagonal = w.diagonal + odd;
  // gathered first: on the host the loop after this one is then free of strides, and its divisions are vectorised
  for (int r = team.rank(); r < pairs; r += team.size()) {
    T& off = w.lower[packed_row(2 * r + odd + 1) + 2 * r + odd];
    sines[r] = off;
    off = 0;
  }
  for (int r = team.rank(); r < pairs; r += team.size()) {
    // Tangent of the smaller of the two angles that annihilate `off`. zeta^2 may overflow: 0 is then the right answer.
    // Negligible elements are dropped: rotating by them would stir clusters of equal eigenvalues for ever.
    const T p = diagonal[2 * r], q = diagonal[2 * r + 1], off = sines[r];
    const T zeta = (q - p) / (2 * off);
    const T angle = copysign(T(1), zeta) / (fabs(zeta) + sqrt(1 + zeta * zeta));
    const T tangent = negligible(off, p, q) ? T(0) : angle;
    const T cosine = 1 / sqrt(1 + tangent * tangent);
    cosines[r] = cosine;
    sines[r] = tangent * cosine;
    diagonal[2 * r] = q + tangent * off;  // the pair swaps places
    diagonal[2 * r + 1] = p - tangent * off;
  }
}

// (x, y) <- (s x + c y, c x - s y): the rotation and the swap in one.
template <typename T>
BLK_HD void rotate(T c, T s, T& x, T& y) {
  const T old_x = x;
  x = s * old_x + c * y;
  y = c * old_x - s * y;
}

// One round: A <- J^T A J on the lower triangle and V <- V J, with J the rotations of all pairs.
template <typename Team, typename T>
BLK_HD void rotate_round(const Team& team, const Workspace<T>& w, int n, int odd) {
  const int pairs = (n - odd) / 2;
  rotate_pairs(team, w, pairs, odd);
  team.sync();
  const T* __restrict__ cosines = w.cosines;
  const T* __restrict__ sines = w.sines;

  // 2 x 2 blocks: the two rows of pair r, the two columns of pair k < r; and column 0 where it has no partner
  for (int r = team.row(); r < pairs; r += team.rows()) {
    T* __restrict__ upper = w.lower + packed_row(2 * r + odd);
    T* __restrict__ lower = w.lower + packed_row(2 * r + odd + 1);
    const T c = cosines[r], s = sines[r];
    if (odd && team.lane() == 0) rotate(c, s, upper[0], lower[0]);
    for (int k = team.lane(); k < r; k += team.lanes()) {
      const int j = 2 * k + odd;
      T a00 = upper[j], a01 = upper[j + 1], a10 = lower[j], a11 = lower[j + 1];
      rotate(c, s, a00, a10);
      rotate(c, s, a01, a11);
      rotate(cosines[k], sines[k], a00, a01);
      rotate(cosines[k], sines[k], a10, a11);
      upper[j] = a00;
      upper[j + 1] = a01;
      lower[j] = a10;
      lower[j + 1] = a11;
    }
  }
  // the last row where it has no partner: its columns only
  if ((n - odd) % 2 == 1 && team.row() == team.rows() - 1) {
    T* __restrict__ last = w.lower + packed_row(n - 1);
    for (int k = team.lane(); k < pairs; k += team.lanes()) {
      rotate(cosines[k], sines[k], last[2 * k + odd], last[2 * k + odd + 1]);
    }
  }
  for (int r = team.row(); r < pairs; r += team.rows()) {
    T* __restrict__ v = w.vectors + (2 * r + odd) * n;
    T* __restrict__ u = v + n;
    const T c = cosines[r], s = sines[r];
    for (int j = team.lane(); j < n; j += team.lanes()) rotate(c, s, v[j], u[j]);
  }
  team.sync();
}

// Copies the lower triangle of `input`, n x n row-major. Returns whether all that this thread copied is finite.
template <typename Team, typename T>
BLK_HD bool load_lower(const Team& team, const T* __restrict__ input, const Workspace<T>& w, int n) {
  bool finite = true;
  for (int i = team.row(); i < n; i += team.rows()) {
    for (int j = team.lane(); j <= i; j += team.lanes()) {
      const T a = input[i * n + j];
      (j < i ? w.lower[packed_row(i) + j] : w.diagonal[i]) = a;
      finite &= a - a == 0;
    }
  }
  return finite;
}

template <typename Team, typename T>
BLK_HD void set_vectors_to_identity(const Team& team, const Workspace<T>& w, int n) {
  for (int i = team.row(); i < n; i += team.rows()) {
    for (int j = team.lane(); j < n; j += team.lanes()) w.vectors[i * n + j] = i == j;
  }
}

// Sweeps until the matrix in `w` is diagonal, J being the product of all rotations: A <- J^T A J and, on the vectors as
// columns, V <- V J. Between what loaded them and this there has to be a barrier; it ends with one. Returns the number of
// sweeps, or kNotConverged. `scratch`: n * n numbers.
template <typename Team, typename T>
BLK_HD int diagonalise(const Team& team, const Workspace<T>& w, T* scratch, int n) {
  int sweeps = 0;
  bool converged = is_diagonal(team, w, n);
  while (!converged && sweeps < kMaxSweeps) {
    sort_diagonal(team, w, scratch, n);
    for (int i = 0; i < n; ++i) rotate_round(team, w, n, i % 2);
    ++sweeps;
    converged = is_diagonal(team, w, n);
  }
  return converged ? sweeps : kNotConverged;
}

// The vectors as columns of `to`, n x n row-major, in the order that `find_order` found.
template <typename Team, typename T>
BLK_HD void store_vectors(const Team& team, const Workspace<T>& w, T* __restrict__ to, int n) {
  for (int i = team.row(); i < n; i += team.rows()) {
    const T* __restrict__ from = w.vectors + w.order[i] * n;
    for (int j = team.lane(); j < n; j += team.lanes()) to[j * n + i] = from[j];
  }
}

template <typename Team, typename T>
BLK_HD void fill(const Team& team, T* to, T value, int count) {
  for (int i = team.rank(); i < count; i += team.size()) to[i] = value;
}

// `input`, `eigenvectors`: n x n row-major, of `input` only the lower triangle is read; `eigenvalues`: n, descending;
// eigenvectors are columns. Returns the number of sweeps; or kNotFinite, with NaN in all results; or kNotConverged.
template <typename Team, typename T>
BLK_HD int small_eigh(const Team& team, const T* __restrict__ input, T* __restrict__ eigenvalues,
                      T* __restrict__ eigenvectors, const Workspace<T>& w, int n) {
  set_vectors_to_identity(team, w, n);
  if (team.any(!load_lower(team, input, w, n))) {
    fill(team, eigenvectors, T(NAN), n * n);
    fill(team, eigenvalues, T(NAN), n);
    return kNotFinite;
  }
  const int result = diagonalise(team, w, eigenvectors, n);
  find_order(team, w, n);
  for (int i = team.rank(); i < n; i += team.size()) eigenvalues[i] = w.diagonal[w.order[i]];
  store_vectors(team, w, eigenvectors, n);
  return result;
}

}  // namespace blk
