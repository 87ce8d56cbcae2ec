// Decodes many GIFs from its input in one process, for builds with sanitizers; a line for each goes to its output.
//
//   gif_main MAX_PIXELS MAX_FRAMES SECONDS < files, each as 4 bytes of length, 1 if a trailer is required, 1 of the size, and its bytes
//   -> STATUS FRAMES WIDTH HEIGHT CRC CRC_OF_RESIZED     status 0: decoded; else left to Pillow
//
// Exits with 77 where a file takes more than SECONDS, with 78 where vector instructions give other frames than plain code.

#include "../../kernels/gif.cpp"

#include <cstdio>
#include <unistd.h>

#include <csignal>

namespace {

uint32_t crc32(const std::vector<uint8_t>& bytes) {
  static uint32_t table[256];
  if (!table[1])
    for (uint32_t n = 0; n < 256; ++n) {
      uint32_t value = n;
      for (int bit = 0; bit < 8; ++bit) value = value & 1 ? 0xEDB88320u ^ value >> 1 : value >> 1;
      table[n] = value;
    }
  uint32_t crc = ~0u;
  for (uint8_t byte : bytes) crc = table[(crc ^ byte) & 255] ^ crc >> 8;
  return ~crc;
}

// Frames at `size` (0: the canvas's), in memory of exactly their size, so that one byte beyond is seen.
int decode(const std::vector<uint8_t>& file, int64_t max_pixels, bool trailer, const uint32_t* shape, uint32_t size, bool plain, std::vector<uint8_t>& frames) {
  const size_t pixels = size ? size_t(size) * size : size_t(shape[0]) * shape[1];
  std::vector<uint8_t>(3 * shape[2] * pixels).swap(frames);
  std::vector<int32_t> delays(shape[2]);
  return t2v_gif_decode(file.data(), file.size(), max_pixels, trailer, shape[2], size, plain, frames.data(), delays.data());
}

void report(const std::vector<uint8_t>& file, int64_t max_pixels, bool trailer, uint32_t max_frames, uint32_t size) {
  uint32_t shape[3] = {};
  int status = t2v_gif_scan(file.data(), file.size(), max_pixels, trailer, shape);
  std::vector<uint8_t> frames, resized, plain;
  if (!status && (shape[2] < 1 || shape[2] > max_frames || int64_t(shape[0]) * shape[1] * shape[2] > max_pixels)) status = 9;
  if (!status) status = decode(file, max_pixels, trailer, shape, 0, false, frames);
  if (!status) {
    int vector = decode(file, max_pixels, trailer, shape, size, false, resized);
    int other = decode(file, max_pixels, trailer, shape, size, true, plain);
    if (vector || other || resized != plain) _exit(78);
  }
  std::printf("%d %u %u %u %u %u\n", status, shape[2], shape[0], shape[1], crc32(frames), crc32(resized));
  std::fflush(stdout);
}

void hang(int) { _exit(77); }

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  std::signal(SIGALRM, hang);
  for (uint8_t head[6]; std::fread(head, 1, 6, stdin) == 6;) {
    std::vector<uint8_t> file(head[0] | head[1] << 8 | head[2] << 16 | size_t(head[3]) << 24);
    if (std::fread(file.data(), 1, file.size(), stdin) != file.size()) return 3;
    alarm(unsigned(std::atoi(arguments[3])));
    report(file, std::atoll(arguments[1]), head[4], uint32_t(std::atoi(arguments[2])), head[5]);
    alarm(0);
  }
  return 0;
}
