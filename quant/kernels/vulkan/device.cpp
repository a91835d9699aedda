#if defined(SLOTMOE_SHADERS) && __has_include(<vulkan/vulkan_core.h>)
#include "device.h"

#if defined(_WIN32)
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include <algorithm>
#include <cstring>

namespace slotmoe::vulkan {
namespace {

constexpr int64_t kStaging = 16 << 20;  // half of it is filled while the other half is copied
constexpr int64_t kForever = INT64_MAX;
constexpr const char* kLess = ": give less --ram, or take --device cpu";

[[noreturn]] void fail(Code code, const std::string& text) { throw Failure{code, text}; }

PFN_vkGetInstanceProcAddr system_loader() {
#if defined(_WIN32)
    HMODULE library = LoadLibraryA("vulkan-1.dll");
    void* found = library ? reinterpret_cast<void*>(GetProcAddress(library, "vkGetInstanceProcAddr")) : nullptr;
#else
    void* library = dlopen("libvulkan.so.1", RTLD_NOW | RTLD_LOCAL);
    void* found = library ? dlsym(library, "vkGetInstanceProcAddr") : nullptr;
#endif
    if (!found) fail(kNoDevice, "there is no Vulkan loader (libvulkan.so.1; vulkan-1.dll on Windows)");
    return reinterpret_cast<PFN_vkGetInstanceProcAddr>(found);  // the library stays: drivers have threads
}

// What is asked of a device and what one has.
struct Features {
    VkPhysicalDeviceVulkan13Features v13{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_3_FEATURES};
    VkPhysicalDeviceVulkan12Features v12{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES, &v13};
    VkPhysicalDeviceFeatures2 all{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2, &v12};

    std::pair<VkBool32*, const char*> wanted(size_t at) {
        const std::pair<VkBool32*, const char*> list[] = {{&v13.synchronization2, "synchronization2"},
                                                          {&v13.maintenance4, "maintenance4"},
                                                          {&v12.bufferDeviceAddress, "bufferDeviceAddress"},
                                                          {&v12.timelineSemaphore, "timelineSemaphore"},
                                                          {&all.features.shaderInt64, "shaderInt64"}};
        return at < 5 ? list[at] : std::make_pair(nullptr, nullptr);
    }
};

}  // namespace

Instance::Instance(PFN_vkGetInstanceProcAddr loader) {
    const auto get = loader ? loader : system_loader();
    const auto global = [&](const char* name) { return get(nullptr, name); };
    const auto version = reinterpret_cast<PFN_vkEnumerateInstanceVersion>(global("vkEnumerateInstanceVersion"));
    uint32_t number = 0;
    if (!version || version(&number) || number < VK_API_VERSION_1_3) {
        fail(kNoDevice, "the Vulkan loader is older than 1.3");
    }
    VkApplicationInfo application{VK_STRUCTURE_TYPE_APPLICATION_INFO};
    application.pApplicationName = "slotmoe";
    application.apiVersion = VK_API_VERSION_1_3;
    VkInstanceCreateInfo info{VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO};
    info.pApplicationInfo = &application;
    const auto create = reinterpret_cast<PFN_vkCreateInstance>(global("vkCreateInstance"));
    if (const VkResult result = create(&info, nullptr, &instance)) {
        const Code code = result == VK_ERROR_OUT_OF_HOST_MEMORY ? kNoMemory : kNoDevice;
        fail(code, "no Vulkan driver starts (vkCreateInstance: " + std::to_string(result) + ")");
    }
#define SLOTMOE_LOAD(name) vk.name = reinterpret_cast<PFN_vk##name>(get(instance, "vk" #name));
    SLOTMOE_VULKAN_FUNCTIONS(SLOTMOE_LOAD)
#undef SLOTMOE_LOAD
}

Instance::~Instance() {
    if (instance) vk.DestroyInstance(instance, nullptr);
}

std::vector<VkPhysicalDevice> Instance::devices() const {
    uint32_t count = 0;
    std::vector<VkPhysicalDevice> all;
    VkResult result = vk.EnumeratePhysicalDevices(instance, &count, nullptr);
    if (!result) {
        all.resize(count);
        result = vk.EnumeratePhysicalDevices(instance, &count, all.data());
        all.resize(count);
    }
    if (result < 0) fail(kNoDevice, "no Vulkan devices are told (" + std::to_string(result) + ")");
    return all;
}

DeviceInfo Instance::describe(VkPhysicalDevice device, Limits* limits, std::vector<std::string>* extensions) const {
    DeviceInfo info{};
    VkPhysicalDeviceExternalMemoryHostPropertiesEXT import{
        VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_EXTERNAL_MEMORY_HOST_PROPERTIES_EXT};
    VkPhysicalDeviceVulkan11Properties v11{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_PROPERTIES, &import};
    VkPhysicalDeviceVulkan13Properties v13{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_3_PROPERTIES, &v11};
    VkPhysicalDeviceProperties2 properties{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2, &v13};
    vk.GetPhysicalDeviceProperties2(device, &properties);
    const VkPhysicalDeviceProperties& plain = properties.properties;
    std::strncpy(info.name, plain.deviceName, sizeof(info.name) - 1);
    info.kind = plain.deviceType;
    VkPhysicalDeviceMemoryProperties2 memory{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2};
    vk.GetPhysicalDeviceMemoryProperties2(device, &memory);
    for (uint32_t h = 0; h < memory.memoryProperties.memoryHeapCount; h++) {
        const VkMemoryHeap& heap = memory.memoryProperties.memoryHeaps[h];
        if (heap.flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT) info.heap = std::max(info.heap, int64_t(heap.size));
    }
    const auto refuse = [&](const std::string& text) {
        std::strncpy(info.problem, text.c_str(), sizeof(info.problem) - 1);
        return info;
    };
    if (plain.apiVersion < VK_API_VERSION_1_3) {
        return refuse("it has Vulkan 1." + std::to_string(VK_API_VERSION_MINOR(plain.apiVersion)) + ", 1.3 is needed");
    }
    Features has;
    vk.GetPhysicalDeviceFeatures2(device, &has.all);
    for (size_t at = 0; has.wanted(at).first; at++) {
        if (!*has.wanted(at).first) return refuse(std::string("it lacks ") + has.wanted(at).second);
    }
    if (plain.limits.maxComputeWorkGroupInvocations < 256 || plain.limits.maxComputeSharedMemorySize < 32768) {
        return refuse("its workgroups are too small");
    }
    uint32_t count = 0;
    vk.EnumerateDeviceExtensionProperties(device, nullptr, &count, nullptr);
    std::vector<VkExtensionProperties> all(count);
    vk.EnumerateDeviceExtensionProperties(device, nullptr, &count, all.data());
    const auto among = [&](const char* name) {
        return std::any_of(all.begin(), all.end(), [&](const auto& it) { return !std::strcmp(it.extensionName, name); });
    };
    const char* const import_name = VK_EXT_EXTERNAL_MEMORY_HOST_EXTENSION_NAME;
    if (!among(import_name)) return refuse(std::string("its driver lacks ") + import_name + ", by which experts in RAM are read");
    if (!limits) return info;
    extensions->push_back(import_name);
    if (among(VK_EXT_MEMORY_BUDGET_EXTENSION_NAME)) extensions->push_back(VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);
    const uint64_t most = std::min(v11.maxMemoryAllocationSize, v13.maxBufferSize);
    limits->allocation = static_cast<int64_t>(std::min(most, uint64_t(INT64_MAX)));
    limits->import_alignment = static_cast<int64_t>(import.minImportedHostPointerAlignment);
    limits->has_budget = among(VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);
    limits->unified = plain.deviceType == VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU ||
                      plain.deviceType == VK_PHYSICAL_DEVICE_TYPE_CPU;
    limits->threads = plain.limits.maxComputeWorkGroupInvocations;
    return info;
}

Device::Device(PFN_vkGetInstanceProcAddr loader, int64_t index) : instance_(loader) {
    const auto all = instance_.devices();
    if (index < 0 || index >= static_cast<int64_t>(all.size())) {
        fail(kNoDevice, "there is no Vulkan device " + std::to_string(index) + " of " + std::to_string(all.size()));
    }
    physical_ = all[index];
    std::vector<std::string> extensions;
    const DeviceInfo info = instance_.describe(physical_, &limits_, &extensions);
    if (*info.problem) fail(kNoDevice, std::string(info.name) + " can't be used: " + info.problem);
    try {
        make(physical_, extensions);
    } catch (...) {
        release();
        throw;
    }
}

void Device::make(VkPhysicalDevice physical, const std::vector<std::string>& extensions) {
    uint32_t count = 0;
    vk().GetPhysicalDeviceQueueFamilyProperties(physical, &count, nullptr);
    std::vector<VkQueueFamilyProperties> families(count);
    vk().GetPhysicalDeviceQueueFamilyProperties(physical, &count, families.data());
    const auto family = [&](VkQueueFlags must, VkQueueFlags never) {
        for (uint32_t i = 0; i < count; i++) {
            const VkQueueFlags flags = families[i].queueFlags;
            if ((flags & must) == must && !(flags & never)) return i;
        }
        return count;
    };
    uint32_t work = family(VK_QUEUE_COMPUTE_BIT, VK_QUEUE_GRAPHICS_BIT);
    if (work == count) work = family(VK_QUEUE_COMPUTE_BIT, 0);
    if (work == count) fail(kNoDevice, "the device computes nothing");
    uint32_t copies = family(VK_QUEUE_TRANSFER_BIT, VK_QUEUE_GRAPHICS_BIT | VK_QUEUE_COMPUTE_BIT);
    limits_.separate_copies = copies != count;
    if (copies == count) copies = work;
    queues_[kWork].family = work;
    queues_[kCopies].family = copies;

    const float priority = 1;
    VkDeviceQueueCreateInfo queues[2];
    for (int lane = 0; lane < 2; lane++) {
        queues[lane] = {VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO};
        queues[lane].queueFamilyIndex = queues_[lane].family;
        queues[lane].queueCount = 1;
        queues[lane].pQueuePriorities = &priority;
    }
    Features features;
    for (size_t at = 0; features.wanted(at).first; at++) *features.wanted(at).first = VK_TRUE;
    std::vector<const char*> names;
    for (const auto& name : extensions) names.push_back(name.c_str());
    VkDeviceCreateInfo info{VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO, &features.all};
    info.queueCreateInfoCount = work == copies ? 1 : 2;
    info.pQueueCreateInfos = queues;
    info.enabledExtensionCount = static_cast<uint32_t>(names.size());
    info.ppEnabledExtensionNames = names.data();
    check(vk().CreateDevice(physical, &info, nullptr, &device_), "opening the device");
    for (auto& queue : queues_) {
        vk().GetDeviceQueue(device_, queue.family, 0, &queue.queue);
        VkSemaphoreTypeCreateInfo type{VK_STRUCTURE_TYPE_SEMAPHORE_TYPE_CREATE_INFO};
        type.semaphoreType = VK_SEMAPHORE_TYPE_TIMELINE;
        VkSemaphoreCreateInfo semaphore{VK_STRUCTURE_TYPE_SEMAPHORE_CREATE_INFO, &type};
        check(vk().CreateSemaphore(device_, &semaphore, nullptr, &queue.timeline), "a semaphore");
        VkCommandPoolCreateInfo pool{VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO};
        pool.flags = VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT;
        pool.queueFamilyIndex = queue.family;
        check(vk().CreateCommandPool(device_, &pool, nullptr, &queue.pool), "a pool of commands");
    }
    const VkPushConstantRange range{VK_SHADER_STAGE_COMPUTE_BIT, 0, kPushBytes};
    VkPipelineLayoutCreateInfo layout{VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO};
    layout.pushConstantRangeCount = 1;
    layout.pPushConstantRanges = &range;
    check(vk().CreatePipelineLayout(device_, &layout, nullptr, &layout_), "a pipeline's layout");
    VkPhysicalDeviceMemoryProperties2 memory{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2};
    vk().GetPhysicalDeviceMemoryProperties2(physical, &memory);
    heaps_ = memory.memoryProperties;
    for (uint32_t h = 0; h < heaps_.memoryHeapCount; h++) {
        const auto own = [&](uint32_t at) {
            const VkMemoryHeap& heap = heaps_.memoryHeaps[at];
            return heap.flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT ? heap.size : 0;
        };
        if (own(h) > own(heap_)) heap_ = h;
    }
}

Device::~Device() { release(); }

void Device::release() {
    if (!device_) return;
    // What hangs can't be waited for, and what it uses can't be freed.
    if (hung_) {
        instance_.instance = VK_NULL_HANDLE;
        return;
    }
    vk().DeviceWaitIdle(device_);
    while (!memory_.empty()) free(memory_.begin()->second.get());
    for (auto& item : pipelines_) vk().DestroyPipeline(device_, item.second, nullptr);
    vk().DestroyPipelineLayout(device_, layout_, nullptr);
    for (auto& queue : queues_) {
        vk().DestroySemaphore(device_, queue.timeline, nullptr);
        vk().DestroyCommandPool(device_, queue.pool, nullptr);
    }
    vk().DestroyDevice(device_, nullptr);
}

void Device::check(VkResult result, const char* what) {
    if (result >= 0) return;
    const std::string text = std::string(what) + " failed (Vulkan's " + std::to_string(result) + ")";
    if (result == VK_ERROR_DEVICE_LOST) {
        lost_ = true;
        fail(kLost, "the device is lost: " + text);
    }
    fail(result == VK_ERROR_OUT_OF_HOST_MEMORY ? kNoMemory : result == VK_ERROR_OUT_OF_DEVICE_MEMORY ? kRefused : kFailed,
         text);
}

void Device::check_alive() const {
    if (lost_) fail(kLost, "the device is lost; open it again");
}

void Device::budget(int64_t* heap, int64_t* free, int64_t* ours) {
    std::lock_guard lock(mutex_);
    VkPhysicalDeviceMemoryBudgetPropertiesEXT budget{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT};
    VkPhysicalDeviceMemoryProperties2 memory{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2};
    if (limits_.has_budget) memory.pNext = &budget;
    vk().GetPhysicalDeviceMemoryProperties2(physical_, &memory);
    *heap = static_cast<int64_t>(heaps_.memoryHeaps[heap_].size);
    *free = *heap - ours_;
    if (limits_.has_budget) *free = static_cast<int64_t>(budget.heapBudget[heap_] - budget.heapUsage[heap_]);
    *free = std::max<int64_t>(*free, 0);
    *ours = ours_;
}

uint32_t Device::memory_type(uint32_t allowed, VkMemoryPropertyFlags must, VkMemoryPropertyFlags better,
                             VkMemoryPropertyFlags worse) const {
    int best = -1;
    uint32_t type = heaps_.memoryTypeCount;
    for (uint32_t i = 0; i < heaps_.memoryTypeCount; i++) {
        const VkMemoryPropertyFlags flags = heaps_.memoryTypes[i].propertyFlags;
        const int worth = 2 * ((flags & better) == better) + !(flags & worse);
        if ((allowed >> i & 1) && (flags & must) == must && worth > best) {
            best = worth;
            type = i;
        }
    }
    if (best < 0) fail(kRefused, "the device has no memory of this kind");
    return type;
}

Memory* Device::allocate(Place kind, int64_t bytes, void* host) {
    std::lock_guard lock(mutex_);
    check_alive();
    const std::string amount = std::to_string(bytes) + " bytes";
    if (bytes < 1 || kind < kDevice || kind > kImported) fail(kBadArgument, "no memory is asked for");
    if (bytes > limits_.allocation) {
        fail(kRefused, amount + " are more than one allocation's " + std::to_string(limits_.allocation));
    }
    const int64_t alignment = limits_.import_alignment;
    if (kind == kImported && (!host || reinterpret_cast<uintptr_t>(host) % alignment || bytes % alignment)) {
        fail(kNoImport, "memory is imported in whole pages");
    }
    if (kind == kDevice) {
        int64_t heap, left, ours;
        budget(&heap, &left, &ours);
        if (bytes > left) fail(kRefused, amount + " of device memory are asked for, of which " + std::to_string(left) + " are free");
    }
    auto memory = std::make_unique<Memory>();
    memory->bytes = bytes;
    memory->kind = kind;
    const auto undo = [&] {
        if (memory->buffer) vk().DestroyBuffer(device_, memory->buffer, nullptr);
        if (memory->memory) vk().FreeMemory(device_, memory->memory, nullptr);
    };
    try {
        constexpr auto kHost = VK_EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT;
        VkExternalMemoryBufferCreateInfo external{VK_STRUCTURE_TYPE_EXTERNAL_MEMORY_BUFFER_CREATE_INFO};
        external.handleTypes = kHost;
        VkBufferCreateInfo info{VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO};
        if (kind == kImported) info.pNext = &external;
        info.size = bytes;
        info.usage = VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | VK_BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT |
                     VK_BUFFER_USAGE_TRANSFER_SRC_BIT | VK_BUFFER_USAGE_TRANSFER_DST_BIT;
        const uint32_t families[] = {queues_[kWork].family, queues_[kCopies].family};
        if (limits_.separate_copies) {
            info.sharingMode = VK_SHARING_MODE_CONCURRENT;
            info.queueFamilyIndexCount = 2;
            info.pQueueFamilyIndices = families;
        }
        check(vk().CreateBuffer(device_, &info, nullptr, &memory->buffer), "a buffer");
        VkMemoryRequirements needs;
        vk().GetBufferMemoryRequirements(device_, memory->buffer, &needs);
        VkMemoryAllocateFlagsInfo flags{VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_FLAGS_INFO};
        flags.flags = VK_MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT;
        VkImportMemoryHostPointerInfoEXT import{VK_STRUCTURE_TYPE_IMPORT_MEMORY_HOST_POINTER_INFO_EXT};
        VkMemoryAllocateInfo wanted{VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO, &flags};
        wanted.allocationSize = needs.size;
        if (kind == kImported) {
            VkMemoryHostPointerPropertiesEXT can{VK_STRUCTURE_TYPE_MEMORY_HOST_POINTER_PROPERTIES_EXT};
            const VkResult result = vk().GetMemoryHostPointerPropertiesEXT(device_, kHost, host, &can);
            const uint32_t types = needs.memoryTypeBits & can.memoryTypeBits;
            if (result < 0 || !types || needs.size > static_cast<uint64_t>(bytes)) {
                fail(kNoImport, "the driver does not import " + amount + " of RAM" + kLess);
            }
            import.pNext = &flags;
            import.handleType = kHost;
            import.pHostPointer = host;
            wanted.pNext = &import;
            wanted.allocationSize = bytes;
            wanted.memoryTypeIndex = memory_type(types, 0, VK_MEMORY_PROPERTY_HOST_CACHED_BIT, 0);
        } else if (kind == kMapped) {
            constexpr auto kMust = VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_COHERENT_BIT;
            wanted.memoryTypeIndex = memory_type(needs.memoryTypeBits, kMust, VK_MEMORY_PROPERTY_HOST_CACHED_BIT,
                                                 VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT);
        } else {
            wanted.memoryTypeIndex = memory_type(needs.memoryTypeBits, VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT, 0,
                                                 VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT);
        }
        const VkResult result = vk().AllocateMemory(device_, &wanted, nullptr, &memory->memory);
        if (result < 0 && result != VK_ERROR_DEVICE_LOST && result != VK_ERROR_OUT_OF_HOST_MEMORY) {
            if (kind == kImported) fail(kNoImport, "the driver does not import " + amount + " of RAM" + kLess);
            fail(kRefused, "the driver refused " + amount + (kind == kDevice ? " of device memory" : " that the device reads"));
        }
        check(result, "an allocation");
        check(vk().BindBufferMemory(device_, memory->buffer, memory->memory, 0), "binding a buffer");
        if (kind == kMapped) {
            check(vk().MapMemory(device_, memory->memory, 0, VK_WHOLE_SIZE, 0, &memory->mapped), "mapping memory");
        } else if (kind == kImported) {
            memory->mapped = host;
        }
        VkBufferDeviceAddressInfo where{VK_STRUCTURE_TYPE_BUFFER_DEVICE_ADDRESS_INFO};
        where.buffer = memory->buffer;
        memory->address = vk().GetBufferDeviceAddress(device_, &where);
        Memory* made = memory.get();
        memory_.emplace(made->address, std::move(memory));
        if (kind == kDevice) ours_ += bytes;
        return made;
    } catch (...) {
        if (memory) undo();
        throw;
    }
}

bool Device::settled() {
    if ((lost_ || unsure_) && !hung_) vk().DeviceWaitIdle(device_);
    return !hung_;
}

void Device::free(Memory* memory) {
    std::lock_guard lock(mutex_);
    const auto item = memory_.find(memory->address);
    if (item == memory_.end() || item->second.get() != memory) fail(kBadArgument, "this memory is not the device's");
    if (memory->kind == kDevice) ours_ -= memory->bytes;
    if (settled()) {
        vk().DestroyBuffer(device_, memory->buffer, nullptr);
        vk().FreeMemory(device_, memory->memory, nullptr);
    }
    memory_.erase(item);
}

const Memory& Device::holding(uint64_t address, int64_t bytes) const {
    auto item = memory_.upper_bound(address);
    if (item != memory_.begin()) {
        const Memory& memory = *(--item)->second;
        const uint64_t at = address - memory.address;
        if (bytes >= 1 && bytes <= memory.bytes && at <= static_cast<uint64_t>(memory.bytes - bytes)) return memory;
    }
    fail(kBadArgument, "an address is outside of the device's memory");
}

VkPipeline Device::pipeline(const Shader& shader, const Constants& constants) {
    std::lock_guard lock(mutex_);
    check_alive();
    VkPipeline& pipeline = pipelines_[{shader.code, constants}];
    if (pipeline) return pipeline;
    VkShaderModuleCreateInfo code{VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO};
    code.codeSize = shader.bytes;
    code.pCode = shader.code;
    VkShaderModule module;
    check(vk().CreateShaderModule(device_, &code, nullptr, &module), "a shader");
    std::vector<VkSpecializationMapEntry> entries;
    for (uint32_t i = 0; i < constants.size(); i++) entries.push_back({i, 4 * i, 4});
    const VkSpecializationInfo special{static_cast<uint32_t>(entries.size()), entries.data(), 4 * constants.size(),
                                       constants.data()};
    VkComputePipelineCreateInfo info{VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO};
    info.stage = {VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO};
    info.stage.stage = VK_SHADER_STAGE_COMPUTE_BIT;
    info.stage.module = module;
    info.stage.pName = "main";
    info.stage.pSpecializationInfo = &special;
    info.layout = layout_;
    const VkResult result = vk().CreateComputePipelines(device_, VK_NULL_HANDLE, 1, &info, nullptr, &pipeline);
    vk().DestroyShaderModule(device_, module, nullptr);
    check(result, "compiling a shader");
    return pipeline;
}

VkCommandBuffer Device::begin() {
    std::lock_guard lock(mutex_);
    check_alive();
    VkCommandBufferAllocateInfo info{VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO};
    info.commandPool = queues_[kWork].pool;
    info.commandBufferCount = 1;
    VkCommandBuffer buffer;
    check(vk().AllocateCommandBuffers(device_, &info, &buffer), "a command buffer");
    const VkCommandBufferBeginInfo start{VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO};
    check(vk().BeginCommandBuffer(buffer, &start), "a command buffer");
    return buffer;
}

void Device::forget(VkCommandBuffer buffer) {
    std::lock_guard lock(mutex_);
    if (settled()) vk().FreeCommandBuffers(device_, queues_[kWork].pool, 1, &buffer);
}

uint64_t Device::enqueue(Lane lane, VkCommandBuffer buffer) {
    check_alive();
    Queue& queue = queues_[lane];
    VkSemaphoreSubmitInfo wait{VK_STRUCTURE_TYPE_SEMAPHORE_SUBMIT_INFO};  // what was submitted to it before
    wait.semaphore = queue.timeline;
    wait.value = queue.last;
    wait.stageMask = VK_PIPELINE_STAGE_2_ALL_COMMANDS_BIT;
    VkSemaphoreSubmitInfo done = wait;
    done.value++;
    VkCommandBufferSubmitInfo commands{VK_STRUCTURE_TYPE_COMMAND_BUFFER_SUBMIT_INFO};
    commands.commandBuffer = buffer;
    VkSubmitInfo2 info{VK_STRUCTURE_TYPE_SUBMIT_INFO_2};
    info.waitSemaphoreInfoCount = 1;
    info.pWaitSemaphoreInfos = &wait;
    info.commandBufferInfoCount = 1;
    info.pCommandBufferInfos = &commands;
    info.signalSemaphoreInfoCount = 1;
    info.pSignalSemaphoreInfos = &done;
    check(vk().QueueSubmit2(queue.queue, 1, &info, VK_NULL_HANDLE), "a submit");
    return ++queue.last << 1 | lane;
}

uint64_t Device::submit(VkCommandBuffer buffer) {
    std::lock_guard lock(mutex_);
    return enqueue(kWork, buffer);
}

uint64_t Device::reached(Lane lane) {
    uint64_t value = 0;
    check(vk().GetSemaphoreCounterValue(device_, queues_[lane].timeline, &value), "asking a semaphore");
    return value;
}

uint64_t Device::copy(const Copy* copies, int64_t count) {
    std::lock_guard lock(mutex_);
    check_alive();
    if (count < 1) fail(kBadArgument, "nothing is copied");
    for (int64_t i = 0; i < count; i++) {
        holding(copies[i].from, copies[i].bytes);
        holding(copies[i].to, copies[i].bytes);
    }
    VkCommandBuffer buffer = VK_NULL_HANDLE;
    size_t at = 0;
    const uint64_t over = reached(kCopies);
    while (at < copying_.size() && copying_[at].value > over) at++;
    if (at == copying_.size()) {
        VkCommandBufferAllocateInfo info{VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO};
        info.commandPool = queues_[kCopies].pool;
        info.commandBufferCount = 1;
        check(vk().AllocateCommandBuffers(device_, &info, &buffer), "a command buffer");
        copying_.push_back({buffer, 0});
    }
    buffer = copying_[at].buffer;
    VkCommandBufferBeginInfo start{VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO};
    start.flags = VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT;
    check(vk().BeginCommandBuffer(buffer, &start), "a command buffer");
    for (int64_t i = 0; i < count; i++) {
        const Memory &from = holding(copies[i].from, copies[i].bytes), &to = holding(copies[i].to, copies[i].bytes);
        const VkBufferCopy region{copies[i].from - from.address, copies[i].to - to.address,
                                  static_cast<VkDeviceSize>(copies[i].bytes)};
        vk().CmdCopyBuffer(buffer, from.buffer, to.buffer, 1, &region);
    }
    VkMemoryBarrier2 memory{VK_STRUCTURE_TYPE_MEMORY_BARRIER_2};  // what is copied to the host
    memory.srcStageMask = VK_PIPELINE_STAGE_2_COPY_BIT;
    memory.srcAccessMask = VK_ACCESS_2_TRANSFER_WRITE_BIT;
    memory.dstStageMask = VK_PIPELINE_STAGE_2_HOST_BIT;
    memory.dstAccessMask = VK_ACCESS_2_HOST_READ_BIT;
    VkDependencyInfo barrier{VK_STRUCTURE_TYPE_DEPENDENCY_INFO};
    barrier.memoryBarrierCount = 1;
    barrier.pMemoryBarriers = &memory;
    vk().CmdPipelineBarrier2(buffer, &barrier);
    check(vk().EndCommandBuffer(buffer), "a command buffer");
    const uint64_t value = enqueue(kCopies, buffer);
    copying_[at].value = value >> 1;
    return value;
}

void Device::transfer(bool to_device, uint64_t address, char* host, int64_t pieces, int64_t bytes, int64_t stride,
                      int64_t host_stride) {
    if (pieces < 1 || bytes < 1 || stride < 0 || host_stride < 0) fail(kBadArgument, "no bytes are to be moved");
    std::lock_guard staging_lock(staging_mutex_);
    if (!staging_) staging_ = allocate(kMapped, kStaging, nullptr);
    const int64_t room = kStaging / 2;
    uint64_t value[2] = {};
    std::vector<Copy> copies[2];
    std::vector<char*> ends[2];  // where what is read goes
    int half = 0;
    int64_t used = 0;
    const auto finish = [&](int of) {
        if (!value[of]) return;
        wait(value[of], kForever);
        value[of] = 0;
        for (size_t i = 0; !to_device && i < copies[of].size(); i++) {
            const Copy& copy = copies[of][i];
            std::memcpy(ends[of][i], static_cast<char*>(staging_->mapped) + (copy.to - staging_->address), copy.bytes);
        }
        copies[of].clear();
        ends[of].clear();
    };
    const auto flush = [&] {
        if (copies[half].empty()) return;
        value[half] = copy(copies[half].data(), static_cast<int64_t>(copies[half].size()));
        half = 1 - half;
        used = 0;
        finish(half);
    };
    try {
        for (int64_t piece = 0; piece < pieces; piece++) {
            for (int64_t done = 0; done < bytes;) {
                if (used == room) flush();
                const int64_t count = std::min(bytes - done, room - used), at = half * room + used;
                const uint64_t there = address + piece * stride + done;
                char* here = host + piece * host_stride + done;
                if (to_device) {
                    std::memcpy(static_cast<char*>(staging_->mapped) + at, here, count);
                    copies[half].push_back({staging_->address + at, there, count});
                } else {
                    copies[half].push_back({there, staging_->address + at, count});
                    ends[half].push_back(here);
                }
                done += count;
                used += count;
            }
        }
        flush();
        finish(0);
        finish(1);
    } catch (...) {  // what is on its way still uses the staging buffer
        for (const uint64_t on_its_way : value) {
            if (on_its_way && !lost_) wait(on_its_way, kForever);
        }
        throw;
    }
}

bool Device::wait(uint64_t value, int64_t nanoseconds) {
    const Queue& queue = queues_[value & 1];
    const uint64_t wanted = value >> 1;
    std::unique_lock lock(mutex_);
    check_alive();
    if (wanted > queue.last) fail(kBadArgument, "what is waited for was not submitted");
    lock.unlock();
    VkSemaphoreWaitInfo info{VK_STRUCTURE_TYPE_SEMAPHORE_WAIT_INFO};
    info.semaphoreCount = 1;
    info.pSemaphores = &queue.timeline;
    info.pValues = &wanted;
    const VkResult result = vk().WaitSemaphores(device_, &info, static_cast<uint64_t>(nanoseconds));
    lock.lock();
    if (result == VK_TIMEOUT && nanoseconds) {
        lost_ = hung_ = true;
        fail(kTimedOut, "the device has not answered for " + std::to_string(nanoseconds / 1000000) + " ms");
    }
    unsure_ |= result < 0;
    check(result, "waiting for the device");
    return result != VK_TIMEOUT;
}

}  // namespace slotmoe::vulkan
#endif
