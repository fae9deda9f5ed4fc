// Reference arithmetic for the algorithms: a value in long double, and a bound on how far from it a
// computation in T may have strayed. Operators propagate the bounds of their operands; `rounded<T>`
// adds what rounding to the nearest T does to a result. So a reference reads like the formula, with
// `rounded` where the code under test rounds, and no tolerance is chosen by hand.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

namespace bounded {

static_assert(std::numeric_limits<long double>::digits >= 64, "long double must exceed double");

// Half a unit in the last place, relative. The hundredth more covers the roundings of long double
// itself, which are 2,048 times smaller than those of double where it is smallest.
template <typename T>
constexpr long double kRoundoff = 1.01L * std::numeric_limits<T>::epsilon() / 2;

// Options of a group with its learning rate, which the code under test is given by itself.
template <typename Hyper>
struct WithLr : Hyper {
  double lr;
};

struct Bounded {
  long double value;
  long double error = 0;
};

inline Bounded operator-(Bounded a) { return {-a.value, a.error}; }
inline Bounded operator+(Bounded a, Bounded b) { return {a.value + b.value, a.error + b.error}; }
inline Bounded operator-(Bounded a, Bounded b) { return a + -b; }

inline Bounded operator*(Bounded a, Bounded b) {
  return {a.value * b.value,
          std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error};
}

inline Bounded operator/(Bounded a, Bounded b) {
  const long double nearest = std::fabs(b.value) - b.error;
  const long double quotient = a.value / b.value;
  if (nearest <= 0) return {quotient, std::numeric_limits<long double>::infinity()};
  return {quotient, (a.error + std::fabs(quotient) * b.error) / nearest};
}

inline Bounded square_root(Bounded a) {
  const long double root = std::sqrt(a.value);
  if (a.value <= a.error) return {root, std::sqrt(a.value + a.error)};
  return {root, a.error / (root + std::sqrt(a.value - a.error))};
}

template <typename T>
Bounded rounded(Bounded a) {
  const long double underflow = std::numeric_limits<T>::denorm_min() / 2.0L;
  return {a.value, a.error + kRoundoff<T> * (std::fabs(a.value) + a.error) + underflow};
}

// A hyperparameter in T, from what double arithmetic made of it.
template <typename T>
Bounded coefficient(Bounded in_double) {
  return sizeof(T) < sizeof(double) ? rounded<T>(in_double) : in_double;
}

// A gradient times its factor, which is exact for a power of two.
template <typename T>
Bounded scaled(T grad, T factor) {
  int exponent;
  const bool power_of_two = std::fabs(std::frexp(factor, &exponent)) == T(0.5);
  const Bounded product = Bounded{grad} * Bounded{factor};
  return power_of_two ? product : rounded<T>(product);
}

// Keeps the largest share of its bound that an error has used: a bound that no error comes near
// would test nothing.
class Comparison {
 public:
  // Whether `found` is as near to `expected` as it must be.
  template <typename T>
  bool holds(T found, Bounded expected) {
    const long double error = std::fabs(found - expected.value);
    if (!(error <= expected.error)) return false;
    if (expected.error > 0) largest_share_ = std::max(largest_share_, error / expected.error);
    return true;
  }
  long double largest_share() const { return largest_share_; }

 private:
  long double largest_share_ = 0;
};

// An algorithm's values in the type that its update computes in.
template <typename T, template <typename> class Values>
Values<T> in_type(const Values<double>& values) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return values;
  } else {
    return to_float(values);
  }
}

using Random = std::mt19937_64;

inline double uniform(Random& random, double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random);
}
inline double log_uniform(Random& random, double low, double high) {
  return std::exp(uniform(random, std::log(low), std::log(high)));
}
inline double normal(Random& random) { return std::normal_distribution<double>()(random); }

template <typename T>
T choose(Random& random, std::initializer_list<T> options) {
  return options.begin()[random() % options.size()];
}

}  // namespace bounded
