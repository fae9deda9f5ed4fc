// Runs the tests of one executable, or those whose names are given; exits with 1 if one fails.
#include <algorithm>
#include <exception>
#include <iostream>

#include "check.h"

int main(int argc, char** argv) {
  const std::vector<std::string> wanted(argv + 1, argv + argc);
  size_t run = 0, failed = 0;
  for (const check::Test& test : check::tests()) {
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), test.name) == wanted.end())
      continue;
    ++run;
    try {
      test.body();
      std::cout << "passed   " << test.name << std::endl;
    } catch (const check::Skip& skip) {
      std::cout << "skipped  " << test.name << ": " << skip.reason << std::endl;
    } catch (const check::Failure& failure) {
      ++failed;
      std::cout << "FAILED   " << test.name << "\n  " << failure.message << std::endl;
    } catch (const std::exception& error) {
      ++failed;
      std::cout << "FAILED   " << test.name << "\n  " << error.what() << std::endl;
    }
  }
  if (run == 0) std::cout << "no such test\n";
  std::cout << run - failed << " of " << run << " tests passed" << std::endl;
  return failed || run == 0 ? 1 : 0;
}
