// VERSION: the first message (libvfio-user test/py/test_negotiate.py).

#include <nlohmann/json.hpp>

#include "tests/conformance/server_fixture.h"

namespace mvgpu::testing {
namespace {

constexpr std::string_view kQemuJson =
    R"({"capabilities":{"pgsizes":4096,"max_msg_fds":16,"max_dma_maps":65535,)"
    R"("max_data_xfer_size":1048576,"migration":{"max_bitmap_size":268435456,"pgsize":4096},)"
    R"("write_multiple":true}})";
constexpr std::string_view kCloudHypervisorJson =
    R"({"capabilities":{"max_msg_fds":1,"max_data_xfer_size":1048576,"migration":{"pgsize":4096}}})";

Bytes VersionOf(uint16_t minor, std::string_view json) {
  return Bytes{}.U16(0).U16(minor).Text(json).U8(0);
}
// {"capabilities":{<members>}}
Bytes Capabilities(const std::string& members) {
  return VersionOf(1, R"({"capabilities":{)" + members + "}}");
}

class NegotiateTest : public ServerTest {
 protected:
  // An error reply, then the end of the connection.
  void ExpectRefused(const Bytes& body) {
    EXPECT_THAT(Transact(kVersion, body), IsErrorReply(EINVAL));
    EXPECT_EQ(state_, State::kBroken);
    EXPECT_TRUE(client_->is_closed());
    EXPECT_TRUE(log_.lines.empty()) << "the caller reports the end, once";
    Connect();
  }
  nlohmann::json ExpectAccepted(const Bytes& body, uint16_t minor) {
    const Reply reply = Transact(kVersion, body);
    EXPECT_EQ(reply.flags, kTypeReply);
    EXPECT_EQ(reply.at<uint16_t>(0), 0);
    EXPECT_EQ(reply.at<uint16_t>(2), minor);
    EXPECT_LE(reply.size, 214u) << "QEMU's buffer";
    EXPECT_EQ(state_, State::kServing);
    if (reply.body.size() < 5 || reply.body.back() != 0) {
      ADD_FAILURE() << "no JSON with a NUL";
      return {};
    }
    const std::string text(reply.body.begin() + 4, reply.body.end() - 1);
    ExpectStillServing();
    Connect();
    return nlohmann::json::parse(text, nullptr, false);
  }
};

TEST_F(NegotiateTest, AcceptsEveryKnownClient) {
  const nlohmann::json qemu = ExpectAccepted(VersionOf(0, kQemuJson), 0);
  EXPECT_EQ(qemu, nlohmann::json::parse(
                      R"({"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,
                          "pgsizes":4096,"max_dma_maps":65535,"write_multiple":true}})"));
  const nlohmann::json cloud_hypervisor = ExpectAccepted(VersionOf(1, kCloudHypervisorJson), 1);
  EXPECT_EQ(cloud_hypervisor["capabilities"]["max_msg_fds"], 16);
  EXPECT_FALSE(cloud_hypervisor["capabilities"].contains("write_multiple")) << "not offered";
  const nlohmann::json spdk = ExpectAccepted(Bytes{}.U16(0).U16(1), 1);  // no JSON
  EXPECT_EQ(spdk["capabilities"]["max_data_xfer_size"], 1 << 20);
}

TEST_F(NegotiateTest, AcceptsEmptyObjectsAndUnknownCapabilities) {
  ExpectAccepted(VersionOf(1, "{}"), 1);
  ExpectAccepted(Capabilities(""), 1);
  ExpectAccepted(Capabilities(R"("max_msg_fds":1024,"max_data_xfer_size":1048576)"), 1);
  ExpectAccepted(Capabilities(R"("from_the_future":[{}],"max_msg_fds":0)"), 1);
  ExpectAccepted(Capabilities(R"("twin_socket":{"supported":true})"), 1);
}

TEST_F(NegotiateTest, AnswersTheLowerOfBothMinors) {
  ExpectAccepted(VersionOf(0, "{}"), 0);
  ExpectAccepted(VersionOf(1, "{}"), 1);
  ExpectAccepted(VersionOf(65535, "{}"), 1);
}

TEST_F(NegotiateTest, RefusesShortPayloads) {
  ExpectRefused({});
  ExpectRefused(Bytes{}.U16(0));
  ExpectRefused(Bytes{}.U16(0).U8(1));
}

TEST_F(NegotiateTest, RefusesMessageBeyondTheSizeLimitAndCloses) {
  EXPECT_THAT(TransactHeader(kVersion, kMegabyte + 33), IsErrorReply(EINVAL));
  EXPECT_EQ(state_, State::kBroken);
  EXPECT_TRUE(client_->is_closed());
}

TEST_F(NegotiateTest, RefusesAnyOtherFirstMessage) {
  for (const uint16_t command : {uint16_t{0}, kGetInfo, kReset, uint16_t{999}}) {
    Connect();
    EXPECT_THAT(Transact(command, Bytes{}.U32(16).Fill(12)), IsErrorReply(EINVAL)) << command;
    EXPECT_EQ(state_, State::kBroken);
  }
}

TEST_F(NegotiateTest, RefusesOtherMajor) {
  ExpectRefused(Bytes{}.U16(999).U16(0).Text("{}").U8(0));
  ExpectRefused(Bytes{}.U16(1).U16(0));
}

TEST_F(NegotiateTest, RefusesJsonThatDoesNotParse) {
  ExpectRefused(Bytes{}.U16(0).U16(1).Text("{}"));  // no NUL
  ExpectRefused(VersionOf(1, ""));
  ExpectRefused(VersionOf(1, "{"));
  ExpectRefused(VersionOf(1, "\""));
  ExpectRefused(VersionOf(1, "[]"));
  ExpectRefused(VersionOf(1, "\xff\xfe"));
  ExpectRefused(VersionOf(1, std::string(8000, '[')));
  ExpectRefused(VersionOf(1, "{}" + std::string(16 * 1024, ' ')));
}

TEST_F(NegotiateTest, RefusesCapabilitiesOfWrongTypeOrValue) {
  ExpectRefused(VersionOf(1, R"({"capabilities":"23"})"));
  ExpectRefused(VersionOf(1, R"({"capabilities":null})"));
  ExpectRefused(Capabilities(R"("max_msg_fds":"foo")"));
  ExpectRefused(Capabilities(R"("max_msg_fds":-1)"));
  ExpectRefused(Capabilities(R"("max_msg_fds":1025)"));
  ExpectRefused(Capabilities(R"("max_msg_fds":1.5)"));
  ExpectRefused(Capabilities(R"("max_data_xfer_size":1e400)"));
  ExpectRefused(Capabilities(R"("max_data_xfer_size":[])"));
  ExpectRefused(Capabilities(R"("max_dma_maps":true)"));
  ExpectRefused(Capabilities(R"("pgsizes":{})"));
  ExpectRefused(Capabilities(R"("write_multiple":1)"));
  ExpectRefused(Capabilities(R"("twin_socket":1)"));
  ExpectRefused(Capabilities(R"("migration":"23")"));
  ExpectRefused(Capabilities(R"("migration":{"pgsize":"foo"})"));
  ExpectRefused(Capabilities(R"("migration":{"pgsize":4095})"));
  ExpectRefused(Capabilities(R"("migration":{"pgsize":4097})"));
}

TEST_F(NegotiateTest, SecondVersionIsAnErrorButNotTheEnd) {
  Negotiate();
  EXPECT_THAT(Negotiate(), IsErrorReply(EINVAL));
  ExpectStillServing();
}

TEST_F(NegotiateTest, VersionMayComeWithDescriptorsWhichAreClosed) {
  const int fd = NewEventfd();
  EXPECT_EQ(Transact(kVersion, Bytes{}.U16(0).U16(1), {fd, fd}).flags, kTypeReply);
  EXPECT_EQ(OpenFds(), fds_before_ + 2 + sent_fds_.size());  // the two sockets
}

}  // namespace
}  // namespace mvgpu::testing
