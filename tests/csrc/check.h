// A test framework in one header: TEST registers a test, a CHECK that fails ends it with a message.
// check_main.cpp runs them.
#pragma once

#include <iomanip>
#include <sstream>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registration {
  Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

struct Failure {
  std::string message;
};

// Thrown by a test that cannot run here.
struct Skip {
  std::string reason;
};

template <typename... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
  std::ostringstream message;
  message << file << ":" << line << ": " << std::setprecision(20);
  (message << ... << parts);
  throw Failure{message.str()};
}

}  // namespace check

#define TEST(name)                                                   \
  static void name();                                                \
  static const check::Registration name##_registration(#name, name); \
  static void name()

// CHECK(condition, parts of a message...)
#define CHECK(condition, ...)                                                                    \
  do {                                                                                           \
    if (!(condition)) check::fail(__FILE__, __LINE__, #condition, " is false. ", ##__VA_ARGS__); \
  } while (false)

#define CHECK_EQ(found, expected, ...)                                                  \
  do {                                                                                  \
    const auto& found_ = (found);                                                       \
    const auto& expected_ = (expected);                                                 \
    if (!(found_ == expected_))                                                         \
      check::fail(__FILE__, __LINE__, #found, " is ", found_, ", expected ", expected_, \
                  ". ", ##__VA_ARGS__);                                                 \
  } while (false)
