// csrc/small_eigh.h and nystrom_eigh.h with a team of threads that meet at barriers, as a CUDA block does, against the
// same with one thread: results must be equal to the bit. Under ThreadSanitizer a missing barrier is a reported race even
// where nothing went wrong. Prints one line per case.
#include <atomic>
#include <barrier>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "../csrc/nystrom_eigh.h"

struct Shared {
  explicit Shared(int size) : meet(size) {}
  std::barrier<> meet;
  std::atomic<int> votes{0};
};

struct ThreadTeam {
  Shared* shared;
  int x, y, width, height;
  int row() const { return y; }
  int rows() const { return height; }
  int lane() const { return x; }
  int lanes() const { return width; }
  int rank() const { return y * width + x; }
  int size() const { return width * height; }
  void sync() const { shared->meet.arrive_and_wait(); }
  bool any(bool condition) const {
    if (condition) ++shared->votes;
    sync();
    const bool result = shared->votes > 0;
    sync();
    if (rank() == 0) shared->votes = 0;
    sync();
    return result;
  }
};

using Numbers = std::vector<double>;

struct Result {
  Numbers values, vectors, combination;
  int eigh = 0, nystrom = 0;
  bool operator==(const Result&) const = default;
};

template <typename Run>
void as_team(int width, int height, const Run& run) {
  Shared shared(width * height);
  std::vector<std::thread> threads;
  for (int i = 0; i < width * height; ++i) {
    threads.emplace_back([&, i] { run(ThreadTeam{&shared, i % width, i / width, width, height}); });
  }
  for (auto& thread : threads) thread.join();
}

// Width 0: the team of one that the CPU build uses.
Result solve(const Numbers& core, const Numbers& gram, int n, int width, int height) {
  Result result{Numbers(n), Numbers(n * n), Numbers(n * n)};
  Numbers memory(blk::nystrom_eigh_size(n)), vectors(n * n), scratch(n * n);
  std::vector<int> order(n);
  const auto w = blk::make_workspace(memory.data() + n, vectors.data(), order.data(), n);
  const auto run = [&](const auto& team) {
    const int eigh = blk::small_eigh(team, core.data(), result.values.data(), result.vectors.data(), w, n);
    team.sync();
    const int nystrom = blk::nystrom_eigh(team, core.data(), gram.data(), 1e-7, result.combination.data(),
                                          scratch.data(), memory.data(), w, n);
    if (team.rank() == 0) result.eigh = eigh, result.nystrom = nystrom;
  };
  if (width == 0) {
    run(blk::SerialTeam{});
  } else {
    as_team(width, height, run);
  }
  return result;
}

int main() {
  std::mt19937 engine(0);
  std::normal_distribution<double> normal;
  bool all_equal = true;
  for (const int n : {1, 2, 5, 9, 18}) {
    Numbers rows(n * n), core(n * n), gram(n * n);
    for (double& value : rows) value = normal(engine);
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) {
        for (int m = 0; m < n; ++m) {
          core[i * n + j] += rows[i * n + m] * rows[j * n + m];
          gram[i * n + j] += rows[m * n + i] * rows[m * n + j];
        }
      }
    }
    const Result expected = solve(core, gram, n, 0, 0);
    for (const auto& [width, height] : {std::pair{1, 1}, {2, 1}, {1, 3}, {3, 2}}) {
      const Result found = solve(core, gram, n, width, height);
      const bool equal = found == expected && found.eigh >= 0 && found.nystrom >= 0;
      std::printf("n = %d, %d lanes, %d rows: %s\n", n, width, height, equal ? "equal" : "DIFFERENT");
      all_equal &= equal;
    }
  }
  return all_equal ? 0 : 1;
}
