#include "remote.h"

#include "llama-ext.h"

#include <cstring>

namespace entmtp {

remote_servers::remote_servers(const llama_model * model) {
    for (int32_t i = 0; i < llama_model_n_devices(model); ++i) {
        ggml_backend_dev_t dev = llama_model_get_device(model, i);
        ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
        if (!reg || strcmp(ggml_backend_reg_name(reg), "RPC") != 0) {
            continue;
        }
        if (void * f = ggml_backend_reg_get_proc_address(reg, "ggml_backend_rpc_n_lost")) {
            n_lost                = reinterpret_cast<decltype(n_lost)>(f);
            const char * endpoint = ggml_backend_dev_description(dev);
            servers.emplace_back(endpoint, n_lost(endpoint));
        }
    }
}

const char * remote_servers::lost() const {
    for (const auto & [endpoint, before] : servers) {
        if (n_lost(endpoint.c_str()) != before) {
            return endpoint.c_str();
        }
    }
    return nullptr;
}

} // namespace entmtp
