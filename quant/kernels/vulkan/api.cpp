// The C ABI: 0 or a `Code`, whose text the same thread then asks for.
#if defined(SLOTMOE_SHADERS) && __has_include(<vulkan/vulkan_core.h>)
#include "../cpu/api.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "decoder.h"

namespace slotmoe::vulkan {
namespace {

thread_local std::string last_error;

template <class Body>
int guarded_by_text(Body body) {
    try {
        body();
        return kOk;
    } catch (const Failure& failure) {
        last_error = failure.text;
        return failure.code;
    } catch (const std::bad_alloc&) {
        last_error.clear();
        return kNoMemory;
    }
}

// A device with its decoders, which go before it.
struct Opened {
    Opened(PFN_vkGetInstanceProcAddr loader, int64_t index) : device(loader, index) {}
    Device device;
    std::mutex mutex;
    std::vector<std::unique_ptr<Decoder>> decoders;
};

}  // namespace

EXPORT const char* slotmoe_vulkan_error() { return last_error.c_str(); }

EXPORT int slotmoe_vulkan_devices(PFN_vkGetInstanceProcAddr loader, DeviceInfo* infos, int64_t capacity, int64_t* count) {
    return guarded_by_text([&] {
        const Instance instance(loader);
        *count = 0;
        for (const VkPhysicalDevice device : instance.devices()) {
            if (*count < capacity) infos[(*count)++] = instance.describe(device, nullptr, nullptr);
        }
    });
}

EXPORT int slotmoe_vulkan_open(PFN_vkGetInstanceProcAddr loader, int64_t index, Opened** opened, Limits* limits) {
    return guarded_by_text([&] {
        auto made = std::make_unique<Opened>(loader, index);
        *limits = made->device.limits();
        *opened = made.release();
    });
}

EXPORT int slotmoe_vulkan_close(Opened* opened) {
    return guarded_by_text([&] { delete opened; });
}

EXPORT int slotmoe_vulkan_budget(Opened* opened, int64_t* out) {
    return guarded_by_text([&] { opened->device.budget(out, out + 1, out + 2); });
}

EXPORT int slotmoe_vulkan_allocate(Opened* opened, int64_t kind, int64_t bytes, void* host, uint64_t* address,
                                   void** mapped) {
    return guarded_by_text([&] {
        const Memory* memory = opened->device.allocate(static_cast<Place>(kind), bytes, host);
        *address = memory->address;
        *mapped = memory->mapped;
    });
}

EXPORT int slotmoe_vulkan_copy(Opened* opened, const Copy* copies, int64_t count, uint64_t* value) {
    return guarded_by_text([&] { *value = opened->device.copy(copies, count); });
}

EXPORT int slotmoe_vulkan_write(Opened* opened, uint64_t address, char* host, int64_t pieces, int64_t bytes, int64_t stride,
                                int64_t host_stride) {
    return guarded_by_text([&] { opened->device.transfer(true, address, host, pieces, bytes, stride, host_stride); });
}

EXPORT int slotmoe_vulkan_read(Opened* opened, uint64_t address, char* host, int64_t pieces, int64_t bytes, int64_t stride,
                               int64_t host_stride) {
    return guarded_by_text([&] { opened->device.transfer(false, address, host, pieces, bytes, stride, host_stride); });
}

EXPORT int slotmoe_vulkan_wait(Opened* opened, uint64_t value, int64_t nanoseconds, int64_t* reached) {
    return guarded_by_text([&] { *reached = opened->device.wait(value, nanoseconds); });
}

EXPORT int slotmoe_vulkan_decoder(Opened* opened, const Model* model, Decoder** decoder, Views* views) {
    return guarded_by_text([&] {
        auto made = std::make_unique<Decoder>(opened->device, *model);
        *views = made->views();
        *decoder = made.get();
        std::lock_guard lock(opened->mutex);
        opened->decoders.push_back(std::move(made));
    });
}

EXPORT int slotmoe_vulkan_run(Decoder* decoder, const Step* step) {
    return guarded_by_text([&] { decoder->run(*step); });
}

EXPORT int slotmoe_vulkan_plan(Decoder* decoder, int64_t rows, int64_t first, int64_t last, Operation* operations, int64_t capacity,
                               int64_t* count) {
    return guarded_by_text([&] {
        const auto planned = decoder->plan(rows, first, last);
        *count = std::min(capacity, static_cast<int64_t>(planned.size()));
        std::copy_n(planned.begin(), *count, operations);
    });
}

}  // namespace slotmoe::vulkan
#endif
