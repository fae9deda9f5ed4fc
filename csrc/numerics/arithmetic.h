// The arithmetic that every update is written in: correctly rounded operations only, so that a
// result has the same bits on every instruction set and device. `fma` is used where the source says
// so and nowhere else; the build turns implicit contraction off.
#pragma once

#if defined(__CUDACC__)
#define RECAP_INLINE __host__ __device__ __forceinline__
#else
// Always inlined: the same template is compiled for several instruction sets, and the linker must
// never be left to choose one of the copies.
#define RECAP_INLINE __attribute__((always_inline)) inline
#endif

namespace recap {

RECAP_INLINE float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

RECAP_INLINE double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

RECAP_INLINE float square_root(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

RECAP_INLINE double square_root(double a) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(a);
#else
  return __builtin_sqrt(a);
#endif
}

RECAP_INLINE float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

RECAP_INLINE double divide(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __ddiv_rn(a, b);
#else
  return a / b;
#endif
}

RECAP_INLINE float magnitude(float a) { return __builtin_fabsf(a); }
RECAP_INLINE double magnitude(double a) { return __builtin_fabs(a); }

template <typename T>
RECAP_INLINE constexpr T infinity() {
  return static_cast<T>(__builtin_inf());
}

// What updates say in the place of `?:`, `&&` and `||`, so that a vector can take the place of a
// number (../cpu/vector.h).
template <typename T>
RECAP_INLINE T select(bool condition, T a, T b) {
  return condition ? a : b;
}
RECAP_INLINE bool both(bool a, bool b) { return a && b; }
RECAP_INLINE bool either(bool a, bool b) { return a || b; }

// The factor of a lerp, `from + weight * (to - from)` with 0 < weight <= 1. As torch.lerp does, it
// starts from the nearer end, so that weight 1 gives `to` exactly: a positive factor starts at
// `from`, any other at `to`.
RECAP_INLINE double lerp_factor(double weight) { return weight < 0.5 ? weight : weight - 1.0; }

}  // namespace recap
