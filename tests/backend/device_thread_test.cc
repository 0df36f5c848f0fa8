#include "backend/device_thread.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <future>
#include <thread>
#include <vector>

namespace mvgpu::backend {
namespace {

using std::chrono::seconds;

// Queues with a number of requests in each.
class Queues {
 public:
  // Serves one request, as a vGPU does.
  bool step(uint16_t queue) {
    int waiting = waiting_[queue].load();
    while (waiting > 0) {
      if (waiting_[queue].compare_exchange_weak(waiting, waiting - 1)) {
        ++served;
        return true;
      }
    }
    return false;
  }
  void add(uint16_t queue, int requests) { waiting_[queue] += requests; }
  int waiting(uint16_t queue) const { return waiting_[queue]; }
  bool wait_for(int count) const {
    const auto end = std::chrono::steady_clock::now() + seconds(30);
    while (served < count && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    return served == count;
  }
  std::atomic<int> served = 0;

 private:
  std::array<std::atomic<int>, 64> waiting_ = {};
};

TEST(DeviceThreadTest, OneKickServesAllThatWaits) {
  Queues queues;
  DeviceThread thread([&](uint16_t queue) { return queues.step(queue); });
  queues.add(0, 5);
  queues.add(63, 3);
  thread.kick(0);
  EXPECT_TRUE(queues.wait_for(5));
  thread.kick(63);
  EXPECT_TRUE(queues.wait_for(8));
}

TEST(DeviceThreadTest, QueueThatWasNotKickedIsLeftAlone) {
  Queues queues;
  queues.add(1, 1);
  queues.add(0, 1);
  DeviceThread thread([&](uint16_t queue) { return queues.step(queue); });
  thread.kick(0);
  EXPECT_TRUE(queues.wait_for(1));
  thread.stop();
  EXPECT_EQ(queues.waiting(1), 1);
}

TEST(DeviceThreadTest, QueuesTakeTurns) {
  std::vector<uint16_t> order;
  std::array<int, 2> left = {3, 3};
  std::promise<void> done;
  DeviceThread thread([&](uint16_t queue) {
    if (left[queue] == 0) {
      if (left[0] == 0 && left[1] == 0 && order.size() == 6) {
        order.push_back(99);
        done.set_value();
      }
      return false;
    }
    --left[queue];
    order.push_back(queue);
    return true;
  });
  // Both at once: from a job, so that the thread sees them together.
  thread.post([&] {
    thread.kick(1);
    thread.kick(0);
  });
  ASSERT_EQ(done.get_future().wait_for(seconds(30)), std::future_status::ready);
  thread.stop();
  EXPECT_EQ(order, (std::vector<uint16_t>{0, 1, 0, 1, 0, 1, 99}));
}

TEST(DeviceThreadTest, NoKickIsLostWhenManyThreadsKick) {
  constexpr int kThreads = 8;
  constexpr int kKicks = 2000;
  Queues queues;
  DeviceThread thread([&](uint16_t queue) { return queues.step(queue); });
  std::vector<std::thread> kickers;
  for (int i = 0; i < kThreads; ++i) {
    kickers.emplace_back([&, queue = static_cast<uint16_t>(i * 9)] {
      for (int n = 0; n < kKicks; ++n) {
        queues.add(queue, 1);
        thread.kick(queue);
        // Now and then the thread falls asleep, and must be woken.
        if (n % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    });
  }
  for (std::thread& kicker : kickers) kicker.join();
  EXPECT_TRUE(queues.wait_for(kThreads * kKicks)) << queues.served;
}

// A kick while the queue's step looks in vain: the request that it announces must be found.
TEST(DeviceThreadTest, KickDuringTheLastLookIsNotLost) {
  std::atomic<int> looks = 0;
  std::promise<void> second;
  DeviceThread* self = nullptr;
  DeviceThread thread([&](uint16_t) {
    const int look = ++looks;
    if (look == 1) self->kick(0);
    if (look == 2) second.set_value();
    return false;
  });
  thread.post([&] {
    self = &thread;
    thread.kick(0);
  });
  EXPECT_EQ(second.get_future().wait_for(seconds(30)), std::future_status::ready);
}

TEST(DeviceThreadTest, JobsRunBetweenRequestsOnTheSameThread) {
  std::atomic<bool> in_step = false;
  std::atomic<int> steps = 0;
  std::thread::id step_thread;
  DeviceThread thread([&](uint16_t) {
    in_step = true;
    step_thread = std::this_thread::get_id();
    ++steps;
    in_step = false;
    return true;  // work without an end
  });
  thread.kick(0);
  for (int i = 0; i < 100; ++i) {
    std::promise<bool> ran;
    std::thread::id job_thread;
    thread.post([&] {
      job_thread = std::this_thread::get_id();
      ran.set_value(in_step);
    });
    auto result = ran.get_future();
    ASSERT_EQ(result.wait_for(seconds(30)), std::future_status::ready) << "starved by requests";
    EXPECT_FALSE(result.get());
    EXPECT_NE(job_thread, std::this_thread::get_id());
  }
  thread.stop();
  EXPECT_GT(steps, 0);
}

TEST(DeviceThreadTest, StopFinishesWhatIsUnderWayAndLeavesWhatWaits) {
  std::promise<void> entered;
  std::promise<void> go_on;
  std::atomic<int> finished = 0;
  auto may_go_on = go_on.get_future();
  DeviceThread thread([&](uint16_t) {
    entered.set_value();
    may_go_on.wait();
    ++finished;
    return true;  // and there is more
  });
  thread.kick(0);
  entered.get_future().wait();
  std::atomic<bool> job_ran = false;
  thread.post([&] { job_ran = true; });
  std::thread stopper([&] { thread.stop(); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(finished, 0) << "stop() waits";
  go_on.set_value();
  stopper.join();
  // It may have been through the step before it saw that it should stop; entered would throw then.
  EXPECT_EQ(finished, 1);
  EXPECT_TRUE(job_ran) << "jobs that were posted before are done";
}

// Chores have a period of a millisecond here, or of a day: nothing depends on how long it is.
constexpr auto kSoon = std::chrono::milliseconds(1);
constexpr auto kNever = std::chrono::hours(24);

TEST(DeviceThreadTest, ChoreWaitsForAStepThenRunsWhileItHasSomethingToDo) {
  std::atomic<int> steps = 0;
  std::atomic<int> runs = 0;
  std::atomic<bool> came_early = false;
  std::promise<void> third;
  std::promise<void> fifth;
  DeviceThread thread(
      [&](uint16_t) {
        ++steps;
        return false;
      },
      {.run =
           [&] {
             if (steps == 0) came_early = true;
             ++runs;
             if (runs == 3) third.set_value();
             if (runs == 5) fifth.set_value();
             return runs < 3 || runs == 4;
           },
       .period = kSoon});
  std::promise<void> idle;
  thread.post([&] { idle.set_value(); });
  idle.get_future().wait();
  thread.kick(0);
  ASSERT_EQ(third.get_future().wait_for(seconds(30)), std::future_status::ready);
  // It said that there is nothing to do: only another step brings it back.
  for (int i = 0; i < 20; ++i) {
    std::promise<void> job;
    thread.post([&] { job.set_value(); });
    job.get_future().wait();
  }
  EXPECT_EQ(runs, 3);
  EXPECT_FALSE(came_early);
  thread.kick(1);
  ASSERT_EQ(fifth.get_future().wait_for(seconds(30)), std::future_status::ready);
  EXPECT_EQ(steps, 2);
}

TEST(DeviceThreadTest, ChoreComesAlsoBetweenRequestsThatDoNotEnd) {
  std::promise<void> third;
  int runs = 0;
  DeviceThread thread([](uint16_t) { return true; }, {.run =
                                                          [&] {
                                                            if (++runs == 3) third.set_value();
                                                            return true;
                                                          },
                                                      .period = kSoon});
  thread.kick(0);
  EXPECT_EQ(third.get_future().wait_for(seconds(30)), std::future_status::ready);
}

TEST(DeviceThreadTest, ChoreThatIsNotDueIsNotRunAndDoesNotHoldUpTheEnd) {
  Queues queues;
  DeviceThread thread([&](uint16_t queue) { return queues.step(queue); }, {.run =
                                                                               [] {
                                                                                 ADD_FAILURE()
                                                                                     << "not yet";
                                                                                 return true;
                                                                               },
                                                                           .period = kNever});
  queues.add(0, 3);
  thread.kick(0);
  EXPECT_TRUE(queues.wait_for(3)) << "work goes on meanwhile";
  queues.add(5, 2);
  thread.kick(5);
  EXPECT_TRUE(queues.wait_for(5));
  thread.stop();
}

TEST(DeviceThreadTest, StopTwiceAndKicksAfterwardsAreHarmless) {
  Queues queues;
  queues.add(0, 1);
  DeviceThread thread([&](uint16_t queue) { return queues.step(queue); });
  thread.stop();
  thread.kick(0);
  thread.post([] { ADD_FAILURE() << "nobody runs this"; });
  thread.stop();
  EXPECT_EQ(queues.served, 0);
}

}  // namespace
}  // namespace mvgpu::backend
