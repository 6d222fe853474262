// What a machine can do at best, as the measure of kernels.

#pragma once

namespace entmtp {

void machine_peaks(int n_threads, double * bytes_per_s, double * macs_per_s);

} // namespace entmtp
