#include "host/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace ep::host {
namespace {

[[noreturn]] void fail_with(int error, const std::string& what) {
    throw std::system_error(error, std::generic_category(), what);
}

size_t checked_size(int64_t num_bytes) {
    if (num_bytes < 1) {
        throw std::invalid_argument("num_bytes is " + std::to_string(num_bytes) +
                                    ", must be at least 1");
    }
    return static_cast<size_t>(num_bytes);
}

std::string checked_name(const std::string& name) {
    const std::string full = !name.empty() && name[0] == '/' ? name : "/" + name;
    if (full.size() < 2 || full.size() > 255 || full.find('/', 1) != std::string::npos) {
        throw std::invalid_argument("shared memory name '" + name +
                                    "' must have 1 to 254 characters and no slash inside");
    }
    return full;
}

class FileDescriptor {
  public:
    explicit FileDescriptor(int fd) : fd_(fd) {}
    FileDescriptor(const FileDescriptor&) = delete;
    FileDescriptor& operator=(const FileDescriptor&) = delete;
    ~FileDescriptor() { ::close(fd_); }
    int get() const { return fd_; }

  private:
    int fd_;
};

Mapping map_shared(const FileDescriptor& fd, size_t num_bytes, const std::string& name) {
    void* address =
        mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), /*offset=*/0);
    if (address == MAP_FAILED) fail_with(errno, "mmap of shared memory " + name);
    return Mapping(address, num_bytes);
}

void reserve_pages(const FileDescriptor& fd, int64_t num_bytes, const std::string& name) {
    int error = 0;
    do {
        error = posix_fallocate(fd.get(), 0, num_bytes);
    } while (error == EINTR);
    if (error == 0) return;
    fail_with(error, "reserving " + std::to_string(num_bytes) + " bytes of shared memory " + name +
                         "; enlarge /dev/shm or lower max_tokens");
}

Mapping create_segment(const std::string& name, int64_t num_bytes) {
    const int raw = shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
    if (raw < 0) fail_with(errno, "creating shared memory " + name);
    const FileDescriptor fd(raw);
    try {
        reserve_pages(fd, num_bytes, name);  // grows the file: its bytes are zero
        return map_shared(fd, static_cast<size_t>(num_bytes), name);
    } catch (...) {
        shm_unlink(name.c_str());
        throw;
    }
}

Mapping open_segment(const std::string& name, int64_t num_bytes) {
    const int raw = shm_open(name.c_str(), O_RDWR, 0);
    if (raw < 0) fail_with(errno, "opening shared memory " + name);
    const FileDescriptor fd(raw);
    struct stat info{};
    if (fstat(fd.get(), &info) != 0) fail_with(errno, "looking at shared memory " + name);
    if (info.st_uid != geteuid() || (info.st_mode & 077) != 0) {
        fail_with(EACCES, "shared memory " + name + " is not private to this user");
    }
    if (info.st_size < num_bytes) {
        throw std::invalid_argument(
            "shared memory " + name + " has " + std::to_string(info.st_size) + " bytes, need " +
            std::to_string(num_bytes) + "; give all ranks the same configuration");
    }
    return map_shared(fd, static_cast<size_t>(num_bytes), name);
}

}  // namespace

Mapping::Mapping(Mapping&& other) noexcept
    : address_(std::exchange(other.address_, nullptr)),
      num_bytes_(std::exchange(other.num_bytes_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
    if (this != &other) {
        close();
        address_ = std::exchange(other.address_, nullptr);
        num_bytes_ = std::exchange(other.num_bytes_, 0);
    }
    return *this;
}

uintptr_t Mapping::address() const {
    if (address_ == nullptr) throw std::logic_error("the memory is closed");
    return reinterpret_cast<uintptr_t>(address_);
}

void Mapping::close() noexcept {
    if (address_ != nullptr) munmap(address_, num_bytes_);
    address_ = nullptr;
    num_bytes_ = 0;
}

HostMemory::HostMemory(int64_t num_bytes) {
    const size_t size = checked_size(num_bytes);
    void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) {
        fail_with(errno, "mapping " + std::to_string(num_bytes) + " bytes of host memory");
    }
    mapping_ = Mapping(address, size);
}

ShmSegment::ShmSegment(const std::string& name, int64_t num_bytes, bool create)
    : name_(checked_name(name)) {
    checked_size(num_bytes);
    mapping_ = create ? create_segment(name_, num_bytes) : open_segment(name_, num_bytes);
}

void ShmSegment::unlink() {
    if (shm_unlink(name_.c_str()) != 0 && errno != ENOENT) {
        fail_with(errno, "unlinking shared memory " + name_);
    }
}

}  // namespace ep::host
