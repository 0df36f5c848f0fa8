// Copies 32-bit words from one device address to another, each with a key mixed in, so that what
// arrives cannot have come another way.
#version 460
#extension GL_EXT_buffer_reference : require

layout(local_size_x = 64) in;

layout(buffer_reference, std430, buffer_reference_align = 4) readonly buffer Source {
  uint words[];
};
layout(buffer_reference, std430, buffer_reference_align = 4) writeonly buffer Target {
  uint words[];
};

layout(push_constant) uniform Job {
  Source source;
  Target target;
  uint count;
  uint key;
} job;

void main() {
  uint i = gl_GlobalInvocationID.x;
  if (i < job.count) job.target.words[i] = job.source.words[i] ^ job.key;
}
