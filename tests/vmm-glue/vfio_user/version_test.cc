#include "vmm-glue/vfio_user/version.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

#include "tests/fakes/result_matchers.h"

namespace mvgpu::testing {
namespace {

using glue::vfio_user::AppendServerVersion;
using glue::vfio_user::ClientVersion;
using glue::vfio_user::ParseClientVersion;
using glue::vfio_user::Payload;

Payload VersionOf(std::string_view json_with_nul, uint8_t minor = 1) {
  Payload payload = {std::byte{0}, std::byte{0}, std::byte{minor}, std::byte{0}};
  for (const char c : json_with_nul) payload.push_back(static_cast<std::byte>(c));
  return payload;
}
Payload Capabilities(const std::string& members) {
  return VersionOf(R"({"capabilities":{)" + members + "}}" + '\0');
}
std::string JsonOf(const ClientVersion& client) {
  Payload reply;
  AppendServerVersion(client, reply);
  return std::string(reinterpret_cast<const char*>(reply.data()) + 4);
}

TEST(VersionTest, AbsentCapabilitiesHaveTheProtocolsDefaults) {
  for (const Payload& payload : {VersionOf(""), VersionOf({"{}\0", 3}), Capabilities("")}) {
    const auto client = ParseClientVersion(payload);
    ASSERT_THAT(client, IsOk());
    EXPECT_EQ(client->minor, 1);
    EXPECT_EQ(client->max_msg_fds, 1u);
    EXPECT_EQ(client->max_data_xfer_size, 1u << 20);
    EXPECT_FALSE(client->write_multiple);
  }
}

TEST(VersionTest, TakesWhatTheClientSays) {
  const auto client = ParseClientVersion(
      Capabilities(R"("max_msg_fds":16,"max_data_xfer_size":4096,"write_multiple":true)"));
  ASSERT_THAT(client, IsOk());
  EXPECT_EQ(client->max_msg_fds, 16u);
  EXPECT_EQ(client->max_data_xfer_size, 4096u);
  EXPECT_TRUE(client->write_multiple);
}

TEST(VersionTest, ReadsNothingBehindTheFirstNul) {
  EXPECT_THAT(ParseClientVersion(VersionOf({"{}\0garbage\0", 11})), IsOk());
  EXPECT_THAT(ParseClientVersion(VersionOf({"{}\0garbage", 10})), FailsWith(ErrorCode::kInvalid));
}

TEST(VersionTest, RefusalSaysWhichCapabilityAndWhatIsAllowed) {
  const auto refused = ParseClientVersion(Capabilities(R"("max_msg_fds":1025)"));
  ASSERT_THAT(refused, FailsWith(ErrorCode::kInvalid));
  EXPECT_EQ(refused.error().message(), "capability max_msg_fds is 1025, allowed are 0 to 1024");
}

TEST(VersionTest, NamesWriteMultipleOnlyToAClientThatKnowsIt) {
  EXPECT_THAT(JsonOf({.write_multiple = true}), ::testing::HasSubstr(R"("write_multiple":true)"));
  EXPECT_THAT(JsonOf({}), ::testing::Not(::testing::HasSubstr("write_multiple")));
}

}  // namespace
}  // namespace mvgpu::testing
