// Lookups sorted by row, against std::stable_sort.
#include "plan/lookups.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>

#include "check.h"

namespace {

using recap::Lookups;

void check_sorted(Lookups& lookups, const std::vector<int64_t>& rows, int64_t table) {
  const auto count = static_cast<int64_t>(rows.size());
  CHECK(lookups.take(rows.data(), count, table));
  lookups.sort();
  std::vector<int64_t> places(rows.size());
  std::iota(places.begin(), places.end(), 0);
  std::stable_sort(places.begin(), places.end(),
                   [&](int64_t a, int64_t b) { return rows[a] < rows[b]; });
  int64_t group = -1;
  for (int64_t i = 0; i < count; ++i) {
    CHECK_EQ(lookups.place(i), places[i], "lookup ", i, " of ", count, " in ", table);
    if (i == 0 || rows[places[i]] != rows[places[i - 1]]) {
      ++group;
      CHECK_EQ(lookups.first(group), i);
      CHECK_EQ(lookups.row(group), rows[places[i]]);
    }
  }
  CHECK_EQ(lookups.rows(), group + 1);
  CHECK_EQ(lookups.first(lookups.rows()), count);
}

TEST(lookups_are_sorted_by_row_and_place) {
  std::mt19937_64 random(3);
  Lookups lookups;  // one for all: nothing of a step is left for the next
  for (const int64_t table : {1, 2, 100, 2048, 2049, 1000000}) {
    for (const int64_t count : {0, 1, 2, 255, 256, 257, 5000}) {
      std::vector<int64_t> rows(count);
      for (int64_t& row : rows) row = static_cast<int64_t>(random() % table);
      check_sorted(lookups, rows, table);
      std::sort(rows.begin(), rows.end());
      check_sorted(lookups, rows, table);
      rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
      check_sorted(lookups, rows, table);
      std::reverse(rows.begin(), rows.end());
      check_sorted(lookups, rows, table);
    }
  }
}

TEST(rows_far_apart_are_sorted) {
  std::mt19937_64 random(4);
  constexpr int64_t kTable = int64_t{1} << 40;
  std::vector<int64_t> rows(3000);
  for (int64_t& row : rows) row = static_cast<int64_t>(random() % kTable);
  rows[17] = kTable - 1;
  rows[18] = 0;
  Lookups lookups;
  check_sorted(lookups, rows, kTable);
}

TEST(a_row_outside_the_table_is_seen) {
  Lookups lookups;
  for (const int64_t outside : {int64_t{-1}, int64_t{5}, INT64_MAX, INT64_MIN}) {
    const std::vector<int64_t> rows = {1, outside, 4};
    CHECK(!lookups.take(rows.data(), 3, 5), "row ", outside);
  }
  const int64_t none = 0;
  CHECK(!lookups.take(&none, 1, 0));
  CHECK(lookups.take(nullptr, 0, 0));
}

}  // namespace
