// What a device's memory can do, for judging passes on it.

#pragma once

#include "ggml-backend.h"

namespace entmtp {

// bytes per second, read and written by an op on every element; the best of a few runs. Throws std::runtime_error
double device_bandwidth(ggml_backend_dev_t dev);

} // namespace entmtp
