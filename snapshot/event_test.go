package snapshot_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

const eventVolume = manifest.VolumeID("vol-0123456789abcdef0")

// happened stores an event that a host tells of, whose clock showed a time, and
// returns its id.
func (w *world) happened(at time.Time) string {
	w.t.Helper()
	e := w.store.VolumeCreated(eventVolume, nil)
	e.Time = at.UTC()
	if err := w.store.AppendEvent(w.ctx, e); err != nil {
		w.t.Fatal(err)
	}
	return e.ID
}

// eventIDs appends the ids of events to a list, and fails for damaged ones.
func eventIDs(t testing.TB, ids *[]string) snapshot.HandleEvent {
	return func(e snapshot.Event, damaged error) error {
		if damaged != nil {
			t.Errorf("damaged: %v", damaged)
		}
		*ids = append(*ids, e.ID)
		return nil
	}
}

func TestEventsAreReadInTheOrderOfTheirTimes(t *testing.T) {
	w := newWorld(t)
	const n = 600 // more than are read at once
	begin := time.Date(2026, 11, 22, 23, 59, 0, 0, time.UTC)
	want := make([]string, n)
	for _, i := range rand.New(rand.NewPCG(1, 2)).Perm(n) {
		want[i] = w.happened(begin.Add(time.Duration(i) * time.Second))
	}
	for _, since := range []int{0, 1, 299, n - 1, n} {
		var got []string
		if err := w.reopen().Events(w.ctx, begin.Add(time.Duration(since)*time.Second), eventIDs(t, &got)); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want[since:], got, cmp.Transformer("empty", func(s []string) []string { return append([]string{}, s...) })); diff != "" {
			t.Errorf("since %d (-want +got):\n%s", since, diff)
		}
	}
	enough := errors.New("enough")
	count := 0
	err := w.store.Events(w.ctx, begin, func(snapshot.Event, error) error {
		count++
		return enough
	})
	if !errors.Is(err, enough) || count != 1 {
		t.Errorf("%d were read when one was enough: %v", count, err)
	}
}

// Each kind of event has EBS's fields.
func TestEventsAreAsEBSHasThem(t *testing.T) {
	w := newWorld(t)
	id, other := manifest.SnapshotID{Lineage: 1, Serial: 1}, manifest.SnapshotID{Lineage: 2, Serial: 2}
	start := time.Now().Add(-time.Minute)
	failed := errors.New("the disk\nis gone")
	members := []snapshot.SetMember{{Snapshot: id, Volume: eventVolume}, {Volume: eventVolume}}
	const snap, vol = `arn:lazyvol:ec2:::snapshot/snap-00000001000000001`, `arn:lazyvol:ec2:::volume/vol-0123456789abcdef0`
	for _, c := range []struct {
		e        snapshot.Event
		kind     string
		resource []string
		detail   string // without times
		times    []string
	}{
		{
			w.store.SnapshotCreated(id, eventVolume, start, nil), "EBS Snapshot Notification", []string{snap},
			`{"event":"createSnapshot","result":"succeeded","cause":"","request-id":"","snapshot_id":"` + snap + `","source":"` + vol + `"}`,
			[]string{"endTime", "startTime"},
		},
		{
			w.store.SnapshotCreated(manifest.SnapshotID{}, "", start, failed), "EBS Snapshot Notification", []string{},
			`{"event":"createSnapshot","result":"failed","cause":"the disk is gone","request-id":""}`, []string{"endTime", "startTime"},
		},
		{
			w.store.SnapshotDeleted(id, start, nil), "EBS Snapshot Notification", []string{snap},
			`{"event":"deleteSnapshot","result":"succeeded","cause":"","request-id":"","snapshot_id":"` + snap + `"}`, []string{"endTime", "startTime"},
		},
		{
			w.store.SnapshotCopied(id, other, w.store, true, start, nil), "EBS Snapshot Notification", []string{snap},
			`{"event":"copySnapshot","result":"succeeded","cause":"","request-id":"","snapshot_id":"` + snap + `","source":"arn:lazyvol:ec2:::snapshot/snap-00000002000000002","incremental":"true"}`,
			[]string{"endTime", "startTime"},
		},
		{
			w.store.SnapshotShared(id, "123456789012", "owner", start, nil), "EBS Snapshot Notification", []string{snap},
			`{"event":"shareSnapshot","result":"succeeded","cause":"","request-id":"","snapshot_id":"` + snap + `","source":"owner"}`, []string{"endTime", "startTime"},
		},
		{
			w.store.SnapshotsCreated(members, start, failed), "EBS Multi-Volume Snapshots Completion Status", []string{snap},
			`{"event":"createSnapshots","result":"failed","cause":"the disk is gone","request-id":"","snapshots":[{"snapshot_id":"` + snap + `","source":"` + vol + `","status":"error"},{"snapshot_id":"","source":"` + vol + `","status":"error"}]}`,
			[]string{"endTime", "startTime"},
		},
		{
			w.store.VolumeCreated(eventVolume, nil), "EBS Volume Notification", []string{vol},
			`{"event":"createVolume","result":"available","cause":"","request-id":""}`, nil,
		},
		{
			w.store.VolumeInitialized(eventVolume, nil), "EBS Volume Notification", []string{vol},
			`{"event":"initializeVolume","result":"succeeded","cause":"","request-id":""}`, []string{"completionTime"},
		},
	} {
		data, err := c.e.Encode()
		if err != nil {
			t.Fatal(err)
		}
		var got struct {
			Type      string         `json:"detail-type"`
			Source    string         `json:"source"`
			Account   string         `json:"account"`
			Resources []string       `json:"resources"`
			Detail    map[string]any `json:"detail"`
		}
		if err := json.Unmarshal(data, &got); err != nil {
			t.Fatal(err)
		}
		var times []string
		for field, value := range got.Detail {
			if strings.HasSuffix(field, "Time") {
				if at, err := time.Parse(time.RFC3339, fmt.Sprint(value)); err != nil || at.After(time.Now()) || at.Before(start.Add(-time.Second)) {
					t.Errorf("%s: %s is %v", c.e.Detail.Event, field, value)
				}
				times = append(times, field)
				delete(got.Detail, field)
			}
		}
		slices.Sort(times)
		var want map[string]any
		if err := json.Unmarshal([]byte(c.detail), &want); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got.Detail); diff != "" {
			t.Errorf("detail (-want +got):\n%s", diff)
		}
		if got.Type != c.kind || got.Source != "lazyvol" || !slices.Equal(got.Resources, c.resource) || !slices.Equal(times, c.times) {
			t.Errorf("%s", data)
		}
		if shared := got.Account == "123456789012"; shared != (c.e.Detail.Event == manifest.EventShareSnapshot) {
			t.Errorf("the account is %q in %s", got.Account, data)
		}
	}
}

func TestEventIsItsOwnersOrTheRecipients(t *testing.T) {
	store := snapshot.New(blockstore.NewMem())
	store.SetOwner("123456789012")
	created := store.VolumeCreated(eventVolume, nil)
	shared := store.SnapshotShared(manifest.SnapshotID{Lineage: 1, Serial: 1}, "210987654321", "123456789012", time.Now(), nil)
	if created.Account != "123456789012" || shared.Account != "210987654321" {
		t.Errorf("of %s and %s", created.Account, shared.Account)
	}
}

func TestSetOfAnySizeFitsIntoItsEvent(t *testing.T) {
	w := newWorld(t)
	members := make([]snapshot.SetMember, 10*manifest.MaxEventSnapshots)
	for i := range members {
		members[i] = snapshot.SetMember{Snapshot: manifest.NewSnapshotID(w.lineage), Volume: manifest.NewVolumeID()}
	}
	if err := w.store.AppendEvent(w.ctx, w.store.SnapshotsCreated(members, time.Now(), errors.New(strings.Repeat("no\x00", 10000)))); err != nil {
		t.Error(err)
	}
}

// However clocks differ, within what S3 lets pass, and whatever the store does:
// each event is handed over once, and those that one look finds in order.
func TestFollowerHandsOverEachEventOnce(t *testing.T) {
	for seed := range uint64(200) {
		synctest.Test(t, func(t *testing.T) { followAtRandom(t, seed) })
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func followAtRandom(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 0))
	upTo := func(d time.Duration) time.Duration { return time.Duration(rng.Int64N(int64(d))) }
	w := newWorld(t)
	follower := w.reopen().FollowEvents(time.Now().Add(-time.Hour))
	all, found := make(map[string]bool), make(map[string]bool)
	enough := errors.New("enough")
	poll := func(most int) {
		last := ""
		err := follower.Poll(w.ctx, func(e snapshot.Event, damaged error) error {
			if most--; most < 0 {
				return enough
			}
			if damaged != nil || found[e.ID] || !all[e.ID] || e.Key() <= last {
				t.Fatalf("%s was found: %t, happened: %t, came after %q, damaged: %v", e.Key(), found[e.ID], all[e.ID], last, damaged)
			}
			found[e.ID], last = true, e.Key()
			return nil
		})
		if err != nil && !errors.Is(err, enough) && !errors.Is(err, blockstore.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	for range rng.IntN(80) {
		switch rng.IntN(6) {
		case 0, 1, 2: // a clock that is wrong by up to half an hour, either way
			all[w.happened(time.Now().Add(upTo(time.Hour)-30*time.Minute))] = true
		case 3:
			time.Sleep(upTo(20 * time.Minute))
		case 4:
			op := []blockstoretest.Op{blockstoretest.OpGet, blockstoretest.OpList}[rng.IntN(2)]
			w.faults.Inject(blockstoretest.Rule{Op: op, Prefix: "events/", Skip: rng.IntN(4), Times: 1}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
		default:
			poll(rng.IntN(20))
		}
	}
	w.faults.Heal()
	poll(len(all))
	if len(found) != len(all) {
		t.Fatalf("%d of %d events were found", len(found), len(all))
	}
	poll(1)
}

// A listing may show an event whose key lies among those listed before.
func TestFollowerOfNewEventsFindsLateOnesAndNoneThatWereThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		for age := range 90 {
			w.happened(time.Now().Add(-time.Duration(age) * time.Minute))
		}
		follower, err := w.reopen().FollowNewEvents(w.ctx)
		if err != nil {
			t.Fatal(err)
		}
		want := []string{w.happened(time.Now().Add(-25 * time.Minute)), w.happened(time.Now().Add(-90 * time.Second)), w.happened(time.Now().Add(20 * time.Minute))}
		var got []string
		for range 2 {
			if err := follower.Poll(w.ctx, eventIDs(t, &got)); err != nil {
				t.Fatal(err)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
	})
}

// A poll asks for the listing once, and for each new event.
func TestPollTakesOneListing(t *testing.T) {
	w := newWorld(t)
	for age := range 50 {
		w.happened(time.Now().Add(-time.Duration(age) * time.Second))
	}
	follower := w.reopen().FollowEvents(time.Now().Add(-time.Hour))
	for _, news := range []int{50, 0, 1} {
		if news == 1 {
			w.happened(time.Now())
		}
		w.faults.Reset()
		var got []string
		if err := follower.Poll(w.ctx, eventIDs(t, &got)); err != nil {
			t.Fatal(err)
		}
		if lists, gets := w.faults.Count(blockstoretest.OpList), w.faults.Count(blockstoretest.OpGet); lists != 1 || gets != news || len(got) != news {
			t.Errorf("%d events took %d listings and %d reads, and %d were found", news, lists, gets, len(got))
		}
	}
}

func TestStoringAnEventTakesOneRequest(t *testing.T) {
	w := newWorld(t)
	w.faults.Reset()
	w.happened(time.Now())
	if made := w.faults.Calls(); len(made) != 1 || made[0].Op != blockstoretest.OpPut {
		t.Errorf("%v", made)
	}
}

func TestDamagedEventHidesNoOther(t *testing.T) {
	w := newWorld(t)
	now := time.Now()
	first, last := w.happened(now.Add(-3*time.Second)), w.happened(now)
	for i, data := range []string{"", `{"version":"7"}`, strings.Repeat("x", manifest.MaxEventLength+1)} {
		key := manifest.EventKey(now.Add(-time.Second), manifest.NewEventID())
		if i == 0 { // one that is another's
			e := w.store.VolumeCreated(eventVolume, nil)
			encoded, err := e.Encode()
			if err != nil {
				t.Fatal(err)
			}
			data = string(encoded)
		}
		if _, err := w.faults.Put(w.ctx, key, []byte(data), blockstore.Condition{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.faults.Put(w.ctx, "events/readme", nil, blockstore.Condition{}); err != nil { // nobody's
		t.Fatal(err)
	}
	var got []string
	damaged := 0
	handle := func(e snapshot.Event, bad error) error {
		if bad != nil {
			damaged++
		} else {
			got = append(got, e.ID)
		}
		return nil
	}
	follower := w.store.FollowEvents(time.Time{})
	for range 2 {
		if err := follower.Poll(w.ctx, handle); err != nil {
			t.Fatal(err)
		}
	}
	if damaged != 3 || !slices.Equal(got, []string{first, last}) {
		t.Errorf("%d are damaged, and %v not", damaged, got)
	}
}

func TestEventsRemovedMeanwhileArePassedOver(t *testing.T) {
	w := newWorld(t)
	gone := w.store.VolumeCreated(eventVolume, nil)
	if err := w.store.AppendEvent(w.ctx, gone); err != nil {
		t.Fatal(err)
	}
	stays := w.happened(time.Now())
	w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpGet, Prefix: gone.Key()}, blockstoretest.Fault{Err: blockstore.ErrNotExist})
	var got []string
	if err := w.store.Events(w.ctx, time.Time{}, eventIDs(t, &got)); err != nil {
		t.Fatal(err)
	}
	if err := w.store.FollowEvents(time.Time{}).Poll(w.ctx, eventIDs(t, &got)); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, []string{stays, stays}) {
		t.Errorf("%v, want %s twice", got, stays)
	}
}

func TestEventWhoseReplyIsLostIsThereOnce(t *testing.T) {
	w := newWorld(t)
	w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Times: 1}, blockstoretest.Fault{LoseReply: true})
	store := snapshot.New(blockstore.Retry(w.faults, blockstore.RetryPolicy{}))
	if err := store.AppendEvent(w.ctx, store.VolumeCreated(eventVolume, nil)); err != nil {
		t.Fatal(err)
	}
	var got []string
	if err := store.Events(w.ctx, time.Time{}, eventIDs(t, &got)); err != nil || len(got) != 1 {
		t.Errorf("%v: %v", got, err)
	}
}

// What is removed is old by the store's clock, whatever its key says.
func TestOldEventsExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		const day = 24 * time.Hour
		for range 1500 { // more than one request removes
			w.happened(time.Now().Add(time.Duration(rand.Int64N(int64(300*day))) - 150*day))
		}
		if _, err := w.faults.Put(w.ctx, "events/readme", nil, blockstore.Condition{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(60 * day)
		young := w.happened(time.Now().Add(-200 * day))
		time.Sleep(20 * day)
		if n, _, err := w.store.ExpireEvents(w.ctx); n != 0 || err != nil {
			t.Errorf("%d of less than 90 days were removed: %v", n, err)
		}
		time.Sleep(11 * day)
		w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpDelete, Skip: 1, Times: 1}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
		if n, _, err := w.store.ExpireEvents(w.ctx); n != 1000 || !errors.Is(err, blockstore.ErrUnavailable) {
			t.Errorf("%d were removed: %v", n, err)
		}
		if n, bytes, err := w.store.ExpireEvents(w.ctx); n != 500 || bytes < 500*100 || err != nil {
			t.Errorf("%d were removed, of %d bytes: %v", n, bytes, err)
		}
		var left []string
		if err := w.store.Events(w.ctx, time.Time{}, eventIDs(t, &left)); err != nil || !slices.Equal(left, []string{young}) {
			t.Errorf("%v are left, want %s: %v", left, young, err)
		}
		if _, _, err := w.faults.Get(w.ctx, "events/readme", 1); err != nil {
			t.Errorf("somebody else's object: %v", err)
		}
	})
}
