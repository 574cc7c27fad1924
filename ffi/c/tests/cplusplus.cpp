// The header is C++ too: the types convert without casts, and the functions link by their C names.
#include "kvfabric.h"

#include <cstring>

int main()
{
    kvf_agent_options options{};
    options.size = sizeof options;
    options.name = "cplusplus";
    kvf_agent *agent = nullptr;
    kvf_status status = kvf_agent_create(&options, &agent);
    if (status != KVF_OK) {
        return 1;
    }
    kvf_region *region = nullptr;
    if (kvf_region_allocate(agent, 4096, KVF_ACCESS_REMOTE_READ, &region) != KVF_OK) {
        return 1;
    }
    kvf_transfer_options wanted{};
    wanted.size = sizeof wanted;
    wanted.operation = KVF_WRITE;
    kvf_transfer *transfer = nullptr;
    status = kvf_transfer_create(agent, nullptr, nullptr, nullptr, 1, &wanted, &transfer);
    bool refused = status == KVF_INVALID && std::strcmp(kvf_status_name(status), "invalid") == 0;
    bool freed = kvf_region_free(region) == KVF_OK && kvf_agent_free(agent) == KVF_OK;
    return refused && freed ? 0 : 1;
}
