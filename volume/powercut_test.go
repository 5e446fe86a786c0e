package volume

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

var (
	oneSeed   = flag.Int64("seed", -1, "run the ordeal of this seed alone, and with -v tell each of its calls")
	ordeals   = flag.Int("ordeals", 3000, "how many ordeals TestPowerCutSchedules runs")
	ordealFor = flag.Duration("for", 20*time.Minute, "with LAZYVOL_STRESS=1, for how long it runs them instead")
)

const (
	ordealSteps = 40

	// shardEnv makes a process one of those among which the seeds are divided:
	// shard, number of shards, seeds or duration, file for its tally.
	shardEnv = "LAZYVOL_POWERCUT_SHARD"
)

// TestPowerCutSchedules runs ordeals, each of a seed that decides on all of it.
// They share the cores as processes: a run has one goroutine at a time, and the
// ids and nonces of its whole process.
func TestPowerCutSchedules(t *testing.T) {
	switch {
	case *oneSeed >= 0:
		repeatOrdeal(t, uint64(*oneSeed))
	case os.Getenv(shardEnv) != "":
		runShard(t)
	default:
		runShards(t)
	}
}

// repeatOrdeal runs the ordeal of one seed and, with -v, tells what it did.
func repeatOrdeal(t *testing.T, seed uint64) {
	// Only afterwards: a goroutine that writes to a file looks idle.
	var calls []string
	defer func() {
		for _, call := range calls {
			fmt.Println(call)
		}
	}()
	var tell func(string)
	if testing.Verbose() {
		tell = func(call string) { calls = append(calls, call) }
	}
	trace := runOrdeal(t, seed, ordealSteps, true, make(map[string]int), tell)
	t.Logf("seed %d: trace %016x", seed, trace)
}

// A shard is a part of the seeds.
type shard struct {
	First, Stride, Count int
	For                  time.Duration // instead of Count
	Tally                string        // the file
}

// runShards runs as many shards as there are cores, and makes sure that they came
// across all there is to come across.
func runShards(t *testing.T) {
	begin := time.Now()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	shards := runtime.GOMAXPROCS(0)
	outputs, errs := make([][]byte, shards), make([]error, shards)
	dir := t.TempDir()
	var running sync.WaitGroup
	for i := range shards {
		s := shard{First: i, Stride: shards, Count: *ordeals, Tally: filepath.Join(dir, fmt.Sprint(i))}
		if os.Getenv("LAZYVOL_STRESS") == "1" {
			s.Count, s.For = 0, *ordealFor
		}
		spec, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), self, "-test.run=^TestPowerCutSchedules$", "-test.timeout=0")
		cmd.Env = append(os.Environ(), shardEnv+"="+string(spec), "GOMAXPROCS=1")
		running.Go(func() { outputs[i], errs[i] = cmd.CombinedOutput() })
	}
	running.Wait()
	tally := make(map[string]int)
	for i, err := range errs {
		if err != nil {
			t.Errorf("shard %d: %v\n%s", i, err, outputs[i])
			continue
		}
		data, err := os.ReadFile(filepath.Join(dir, fmt.Sprint(i)))
		if err != nil {
			t.Fatal(err)
		}
		part := make(map[string]int)
		if err := json.Unmarshal(data, &part); err != nil {
			t.Fatal(err)
		}
		for what, n := range part {
			tally[what] += n
		}
	}
	if t.Failed() {
		return
	}
	t.Logf("%d ordeals of %d steps, %d power cuts, %d kills, %d failed calls in %v",
		tally["ordeals"], ordealSteps, tally["power cuts"], tally["kills"], sum(tally, "failed: "), time.Since(begin).Round(time.Second))
	report(t, tally)
	if tally["ordeals"] < 1000 {
		return // too few to tell
	}
	for _, what := range interesting() {
		if sum(tally, what) == 0 {
			t.Errorf("never: %s", what)
		}
	}
}

func runShard(t *testing.T) {
	var s shard
	if err := json.Unmarshal([]byte(os.Getenv(shardEnv)), &s); err != nil {
		t.Fatal(err)
	}
	tally := make(map[string]int)
	begin := time.Now()
	for seed := s.First; seed < s.Count || time.Since(begin) < s.For; seed += s.Stride {
		ok := t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			runOrdeal(t, uint64(seed), ordealSteps, true, tally, nil)
		})
		if !ok {
			t.Fatalf("to repeat it: go test ./volume -run TestPowerCutSchedules -v -seed=%d", seed)
		}
		tally["ordeals"]++
	}
	data, err := json.Marshal(tally)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.Tally, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// sum adds up what begins with a prefix.
func sum(tally map[string]int, prefix string) int {
	n := 0
	for what, count := range tally {
		if strings.HasPrefix(what, prefix) {
			n += count
		}
	}
	return n
}

func report(t *testing.T, tally map[string]int) {
	var lines []string
	for _, what := range slices.Sorted(maps.Keys(tally)) {
		lines = append(lines, fmt.Sprintf("%7d %s", tally[what], what))
	}
	t.Logf("came across\n%s", strings.Join(lines, "\n"))
}

// interesting are the states that ordeals must come across, each one a prefix of
// what is counted.
func interesting() []string {
	all := []string{
		"attempts that were committed", "attempts that were not committed", "snapshots cancelled",
		"snapshots aborted by another", "snapshots committed", "snapshots deleted", "sealed layers settled",
		"hydrations", "evictions", "visits", "volumes made of a snapshot", "volumes that share a base",
		"volumes opened again after a failed sync", "half-made or half-deleted volumes", "opens that failed",
		"opens without room", "volumes that had grown when they were opened", "restarts that lost sectors that were not synced", "restarts that show sectors of in between",
	}
	for _, end := range []string{"kill", "power cut"} {
		all = append(all, end+" with a sealed layer", end+" after a failed sync")
	}
	for _, how := range []string{"killed", "power cut"} {
		all = append(all,
			how+" between outcome and record", how+" with unsynced log records", how+" while others worked")
		for _, d := range deeds() {
			if !d.harmless {
				all = append(all, how+" during "+d.name)
			}
		}
		for _, doing := range []string{"recovery", "settle"} {
			all = append(all, how+" during "+doing)
		}
		for _, call := range append(targets(), "put of intents", "put of data", "put of pins", "put of outcomes", "delete of pins") {
			if call == takingBack {
				all = append(all, how+" "+call)
			} else {
				all = append(all, how+": "+call)
			}
		}
	}
	for _, call := range targets() {
		all = append(all, "failed: "+call)
	}
	return all
}

// TestPowerCutSchedulesRepeat proves that an odd seed repeats its run, call by
// call. One whose script has company nearly always does: who gets a mutex that
// is let go depends on whether somebody has waited for it for a millisecond.
func TestPowerCutSchedulesRepeat(t *testing.T) {
	for seed := uint64(1); seed < 48; seed += 2 {
		var traces [2]uint64
		tally := make(map[string]int)
		for i := range traces {
			t.Run(fmt.Sprintf("seed=%d,run=%d", seed, i), func(t *testing.T) {
				traces[i] = runOrdeal(t, seed, ordealSteps, true, tally, nil)
			})
		}
		if traces[0] != traces[1] {
			t.Errorf("seed %d: traces %016x and %016x", seed, traces[0], traces[1])
		}
	}
}

// TestPowerCutsAmidConcurrentCalls runs ordeals whose goroutines take no turns: for
// the race detector, and for what happens within a call.
func TestPowerCutsAmidConcurrentCalls(t *testing.T) {
	tally := make(map[string]int)
	for seed := range uint64(max(8, 96/thinning)) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			runOrdeal(t, seed, ordealSteps, false, tally, nil)
		})
	}
	if tally["power cuts"] == 0 || tally["kills"] == 0 {
		t.Errorf("%d power cuts and %d kills", tally["power cuts"], tally["kills"])
	}
}
