// A Vulkan 1.3 device: memory that shaders reach by 64-bit addresses, copies beside the work, and submits in order.
#pragma once
#define VK_NO_PROTOTYPES
#include <vulkan/vulkan_core.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace slotmoe::vulkan {

enum Code : int { kOk = 0, kBadArgument = 1, kNoDevice = 2, kNoMemory = 4, kRefused = 5, kLost = 6, kTimedOut = 7,
                  kNoImport = 8, kFailed = 9 };

struct Failure {
    Code code;
    std::string text;
};

// What is called of Vulkan, out of a library that is loaded when a device is asked for.
#define SLOTMOE_VULKAN_FUNCTIONS(F) \
    F(EnumeratePhysicalDevices) F(GetPhysicalDeviceProperties2) F(GetPhysicalDeviceFeatures2) \
    F(GetPhysicalDeviceMemoryProperties2) F(GetPhysicalDeviceQueueFamilyProperties) \
    F(EnumerateDeviceExtensionProperties) F(DestroyInstance) F(CreateDevice) F(DestroyDevice) F(DeviceWaitIdle) \
    F(GetDeviceQueue) F(CreateBuffer) F(DestroyBuffer) F(GetBufferMemoryRequirements) F(AllocateMemory) F(FreeMemory) \
    F(BindBufferMemory) F(MapMemory) F(GetBufferDeviceAddress) F(GetMemoryHostPointerPropertiesEXT) \
    F(CreateShaderModule) F(DestroyShaderModule) F(CreatePipelineLayout) F(DestroyPipelineLayout) \
    F(CreateComputePipelines) F(DestroyPipeline) F(CreateCommandPool) F(DestroyCommandPool) F(AllocateCommandBuffers) \
    F(FreeCommandBuffers) F(BeginCommandBuffer) F(EndCommandBuffer) F(CmdBindPipeline) F(CmdPushConstants) \
    F(CmdDispatch) F(CmdCopyBuffer) F(CmdPipelineBarrier2) F(QueueSubmit2) F(CreateSemaphore) F(DestroySemaphore) \
    F(WaitSemaphores) F(GetSemaphoreCounterValue)

struct Functions {
#define SLOTMOE_DECLARE(name) PFN_vk##name name;
    SLOTMOE_VULKAN_FUNCTIONS(SLOTMOE_DECLARE)
#undef SLOTMOE_DECLARE
};

struct DeviceInfo {
    char name[256], problem[256];  // why it can't be used, "" if it can
    int64_t kind, heap;            // VkPhysicalDeviceType; bytes of the largest heap of its own
};

struct Limits {
    int64_t allocation, import_alignment, unified, has_budget, threads, separate_copies;  // threads: of a workgroup
};

struct Copy {
    uint64_t from, to;
    int64_t bytes;
};

enum Place : int64_t { kDevice = 0, kMapped = 1, kImported = 2 };

struct Memory {
    VkBuffer buffer;
    VkDeviceMemory memory;
    uint64_t address;
    int64_t bytes, kind;
    void* mapped;
};

// An instance of Vulkan by this loader, or the system's for null.
struct Instance {
    explicit Instance(PFN_vkGetInstanceProcAddr loader);
    ~Instance();
    Instance(const Instance&) = delete;
    std::vector<VkPhysicalDevice> devices() const;
    // What it is; where it can be used and they are asked for, its extensions and how it does what is used.
    DeviceInfo describe(VkPhysicalDevice device, Limits* limits, std::vector<std::string>* extensions) const;

    VkInstance instance = VK_NULL_HANDLE;
    Functions vk{};
};

// Constants of a shader that are known when it is compiled, in order of their ids.
using Constants = std::vector<uint32_t>;
struct Shader {
    const uint32_t* code;
    size_t bytes;
};

// Its functions may be called from several threads.  A value says which submit or copy is meant: its lowest bit is the
// queue's, kWork or kCopies.
class Device {
public:
    enum Lane { kWork = 0, kCopies = 1 };
    static constexpr uint32_t kPushBytes = 24;

    Device(PFN_vkGetInstanceProcAddr loader, int64_t index);
    ~Device();
    Device(const Device&) = delete;

    const Limits& limits() const { return limits_; }
    const Functions& vk() const { return instance_.vk; }
    VkDevice handle() const { return device_; }
    VkPipelineLayout layout() const { return layout_; }

    void budget(int64_t* heap, int64_t* free, int64_t* ours);
    Memory* allocate(Place kind, int64_t bytes, void* host);
    void free(Memory* memory);
    VkPipeline pipeline(const Shader& shader, const Constants& constants);
    VkCommandBuffer begin();  // of the work's queue
    void forget(VkCommandBuffer buffer);
    uint64_t submit(VkCommandBuffer buffer);
    uint64_t copy(const Copy* copies, int64_t count);
    // Pieces of `bytes`, so many bytes apart.  Behind it all is done.
    void transfer(bool to_device, uint64_t address, char* host, int64_t pieces, int64_t bytes, int64_t stride,
                  int64_t host_stride);
    bool wait(uint64_t value, int64_t nanoseconds);
    // Throws what `result` says that is not a success.
    void check(VkResult result, const char* what);
    // Throws for what is not all inside one allocation.
    const Memory& holding(uint64_t address, int64_t bytes) const;

private:
    struct Queue {
        VkQueue queue;
        uint32_t family;
        VkSemaphore timeline;
        VkCommandPool pool;
        uint64_t last;
    };
    struct Pending {
        VkCommandBuffer buffer;
        uint64_t value;
    };

    void make(VkPhysicalDevice physical, const std::vector<std::string>& extensions);
    void release();
    void check_alive() const;
    // Whether what the device may have used can go: nobody has waited for one that was lost meanwhile.
    bool settled();
    uint64_t enqueue(Lane lane, VkCommandBuffer buffer);
    uint64_t reached(Lane lane);
    uint32_t memory_type(uint32_t allowed, VkMemoryPropertyFlags must, VkMemoryPropertyFlags better,
                         VkMemoryPropertyFlags worse) const;

    Instance instance_;
    VkPhysicalDevice physical_ = VK_NULL_HANDLE;
    VkDevice device_ = VK_NULL_HANDLE;
    VkPipelineLayout layout_ = VK_NULL_HANDLE;
    VkPhysicalDeviceMemoryProperties heaps_{};
    uint32_t heap_ = 0;
    Limits limits_{};
    Queue queues_[2] = {};
    std::map<uint64_t, std::unique_ptr<Memory>> memory_;  // by address
    std::map<std::pair<const uint32_t*, Constants>, VkPipeline> pipelines_;
    std::vector<Pending> copying_;
    int64_t ours_ = 0;
    bool lost_ = false, hung_ = false, unsure_ = false;  // unsure: what a failed wait was for may still go on
    std::recursive_mutex mutex_;
    std::mutex staging_mutex_;
    Memory* staging_ = nullptr;
};

}  // namespace slotmoe::vulkan
