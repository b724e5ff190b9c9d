// Errors of sigmoid_tanh.h against long double, in units in the last place of the exact value; prints the worst.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "kernels/sigmoid_tanh.h"

using namespace cvfast;

namespace {

template <class T>
double ulps(T actual, long double exact) {
  const int exponent = std::ilogb(exact);
  return std::fabs(static_cast<double>((actual - exact) / std::ldexp(1.0L, exponent - std::numeric_limits<T>::digits + 1)));
}

struct Worst {
  double sigmoid = 0, tanh = 0;
};

template <class T>
void compare(T x, Worst& worst) {
  const T s = sigmoid<T>(Vector<T>{} + x)[0], t = cvfast::tanh<T>(Vector<T>{} + x)[0];
  const long double exact_s = 1 / (1 + std::exp(-static_cast<long double>(x)));
  if (exact_s > std::numeric_limits<T>::min()) worst.sigmoid = std::fmax(worst.sigmoid, ulps(s, exact_s));
  if (x != 0) worst.tanh = std::fmax(worst.tanh, ulps(t, std::tanh(static_cast<long double>(x))));
}

template <class T>
bool special_values() {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  auto s = [](T x) { return sigmoid<T>(Vector<T>{} + x)[0]; };
  auto t = [](T x) { return cvfast::tanh<T>(Vector<T>{} + x)[0]; };
  return s(inf) == 1 && s(-inf) >= 0 && s(-inf) < std::numeric_limits<T>::min() && s(0) == T(0.5) && std::isnan(s(nan)) &&
         t(inf) == 1 && t(-inf) == -1 && t(0) == 0 && std::isnan(t(nan)) && t(100) == 1 && t(-100) == -1;
}

template <class T>
bool check(const char* type, T step) {
  Worst worst;
  for (T x = T(1e-6); x < 90; x *= step)
    compare(x, worst), compare(-x, worst);
  std::printf("%s: sigmoid %.2f ulp, tanh %.2f ulp\n", type, worst.sigmoid, worst.tanh);
  return worst.sigmoid <= 3 && worst.tanh <= 2 && special_values<T>();
}

}  // namespace

int main() {
  const bool narrow = check<float>("float", 1.00001f), wide = check<double>("double", 1.00001);
  return narrow && wide ? 0 : 1;
}
