package volume

import (
	"bytes"
	"fmt"
	"runtime"
	"runtime/debug"
	"syscall"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
)

// A script is a short run in which something goes wrong at one call. one and two
// are volumes made of the same snapshot, of which this host has nothing yet.
type script struct {
	name string
	run  func(a *actor, one, two *subject) []func() error
}

const scriptSize = 3*blockSize + pageSize + 512

var scripts = []script{
	{"discards of blocks never fetched", func(a *actor, one, two *subject) []func() error {
		return []func() error{
			func() error { return a.discard(one, 0, blockSize) },
			func() error { return a.discard(one, blockSize+pageSize, 3*pageSize) },
			func() error { return a.discard(one, 2*blockSize+100, pageSize) },
			func() error { return a.sync(one) },
			func() error { return a.discard(one, scriptSize-700, 700) },
			func() error { return a.takeSnapshot(one, a.ctx, nil) },
			func() error { return a.verify(one.v.Device, one.disk.data, 0, scriptSize) },
		}
	}},
	{"parts of cold pages", func(a *actor, one, two *subject) []func() error {
		return []func() error{
			func() error { return a.put(one, 100, 100) },
			func() error { return a.put(one, blockSize-300, 600) },
			func() error { return a.sync(one) },
			func() error { return a.put(one, 150, 100) },
			func() error { return a.put(one, 2*blockSize+pageSize/2, 2*pageSize) },
			func() error { return a.takeSnapshot(one, a.ctx, nil) },
			func() error { return a.put(one, 200, 512) },
			func() error { return a.sync(one) },
		}
	}},
	{"hydration and eviction", func(a *actor, one, two *subject) []func() error {
		return []func() error{
			func() error { return a.hydration(one) },
			func() error { return a.put(one, 0, blockSize+pageSize) },
			func() error { return a.evictAll(one) },
			func() error { return a.put(one, blockSize+pageSize+10, 10) },
			func() error { return a.takeSnapshot(one, a.ctx, nil) },
			func() error { return a.hydration(one) },
			func() error { return a.put(one, 512, 512) },
			func() error { return a.evictAll(one) },
			func() error { return a.takeSnapshot(one, a.ctx, nil) },
			func() error { return a.verify(one.v.Device, one.disk.data, 0, scriptSize) },
		}
	}},
	{"remounts", func(a *actor, one, two *subject) []func() error {
		return []func() error{
			func() error { return a.put(one, 0, 3*pageSize) },
			func() error { return a.remount(one) },
			func() error { return a.put(one, pageSize, 512) },
			func() error { return a.discard(one, 2*pageSize, pageSize) },
			func() error { return a.takeSnapshot(one, a.ctx, nil) },
			func() error { return a.remount(one) },
			func() error { return a.put(one, pageSize, 512) },
			func() error { return a.remount(one) },
		}
	}},
	{"two volumes on one base", func(a *actor, one, two *subject) []func() error {
		return []func() error{
			func() error { return a.put(one, 0, blockSize) },
			func() error { return a.hydration(two) },
			func() error { return a.put(two, 700, 5000) },
			func() error { return a.takeSnapshot(one, a.ctx, nil) },
			func() error { return a.evictAll(two) },
			func() error { return a.sync(two) },
			func() error { return a.verify(one.v.Device, one.disk.data, 0, scriptSize) },
			func() error { return a.takeSnapshot(two, a.ctx, nil) },
			func() error { return a.verify(two.v.Device, two.disk.data, 0, scriptSize) },
		}
	}},
	{"resizes", func(a *actor, one, two *subject) []func() error {
		return []func() error{
			func() error { return a.hydration(one) },
			func() error { return a.put(one, scriptSize-700, 700) },
			func() error { return a.resizeTo(one, scriptSize+512) },
			func() error { return a.put(one, one.v.Size()-600, 500) },
			func() error { return a.sync(one) },
			func() error {
				return a.takeSnapshot(one, a.ctx, func(*attempt) error { return a.resizeTo(one, one.v.Size()+2*blockSize+1024) })
			},
			func() error { return a.put(one, one.v.Size()-3*pageSize-100, 3*pageSize) },
			func() error { return a.verify(one.v.Device, one.disk.data, 0, one.v.Size()) },
			func() error { return a.remount(one) },
			func() error { return a.takeSnapshot(one, a.ctx, nil) },
			func() error { return a.hydration(one) },
			func() error { return a.verify(one.v.Device, one.disk.data, 0, one.v.Size()) },
		}
	}},
	{"an aborted snapshot between two", func(a *actor, one, two *subject) []func() error {
		return []func() error{
			func() error { return a.put(one, 0, 2*pageSize) },
			func() error { return a.takeSnapshot(one, a.ctx, nil) },
			func() error { return a.put(one, pageSize, 2*pageSize) },
			func() error { return a.discard(one, blockSize, blockSize) },
			func() error { return a.abortedSnapshot(one) },
			func() error { return a.put(one, 0, 512) },
			func() error { return a.settle(one) },
			func() error { return a.takeSnapshot(one, a.ctx, nil) },
		}
	}},
}

// A mishap is what goes wrong at a call.
type mishap struct {
	name  string
	err   error // nil: the process ends
	power bool
	then  bool // and the power fails once the next one has opened the volumes
}

var mishaps = []mishap{
	{name: "kill"}, {name: "power cut", power: true}, {name: "kill and power cut", then: true},
	{name: "EIO", err: syscall.EIO}, {name: "ENOSPC", err: syscall.ENOSPC},
}

// TestPowerCutSchedulesOfShortScripts has each mishap at each call of each script,
// but for those that -stride leaves out. What fails may happen in part.
func TestPowerCutSchedulesOfShortScripts(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	for i, s := range scripts {
		for j, m := range mishaps {
			t.Run(s.name+"/"+m.name, func(t *testing.T) {
				calls, step := 0, *stride
				for call := (i + j) % step; ; call += step {
					happened := false
					t.Run(fmt.Sprint("call=", call), func(t *testing.T) { happened = runScript(t, s, m, call) })
					if t.Failed() || !happened {
						break
					}
					calls++
				}
				runtime.GC()
				if calls*step < 60 {
					t.Errorf("it went wrong at %d calls only", calls)
				}
			})
		}
	}
}

func runScript(t *testing.T, s script, m mishap, call int) (happened bool) {
	cryptotest.SetGlobalRandom(t, uint64(call))
	synctest.Test(t, func(t *testing.T) {
		o := newOrdeal(t, uint64(call), true, make(map[string]int), nil)
		defer func() {
			o.abandon()
			o.tap.turns.close()
		}()
		one, two := o.siblings()
		o.doing = s.name
		o.tap.target = &target{what: anyCall, skip: call, err: m.err, power: m.power}
		o.tap.aim(true)
		for _, step := range s.run(o.script, one, two) {
			err := step()
			o.tap.turns.settle()
			o.noticeLosses()
			o.check(err)
			if o.crash.Stopped() {
				break
			}
			if o.anyHurt() {
				o.tap.hold() // what was to go wrong has
				o.reopenHurt()
			}
		}
		happened = o.tap.target == nil
		if o.crash.Stopped() {
			if m.then {
				o.end()
				for _, v := range o.volumes {
					o.must(o.reopen(v))
				}
				o.tap.power = true
			}
			o.restart()
		}
		o.calm()
		o.conclude()
	})
	return happened
}

// siblings makes two volumes of a snapshot.
func (o *ordeal) siblings() (one, two *subject) {
	o.Helper()
	data := noise(scriptSize, 1<<20)
	clear(data[pageSize : 2*pageSize])
	id := o.create(nil, scriptSize)
	v := o.open(id)
	o.write(v, data, 0)
	from := o.snapshot(v)
	o.must(v.Close())
	o.must(o.host.Delete(o.ctx, id))
	o.addImage(image{from, bytes.Clone(data)})
	for range 2 {
		id := o.create(&from, 0)
		o.adopt(id, o.open(id), data)
	}
	o.tap.turns.settle()
	return o.volumes[1], o.volumes[2]
}
