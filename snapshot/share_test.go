package snapshot_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func TestSharesAreASet(t *testing.T) {
	w := newWorld(t)
	id := w.create(nil, nil, newDevice(512)).ID()
	for _, step := range []struct{ add, remove, want string }{
		{"b a", "", "a b"},
		{"b c", "a", "b c"},
		{"all", "x", "all b c"},
		{"d", "d", "all b c"},
		{"", "all b c", ""},
	} {
		got, err := w.store.Share(w.ctx, id, strings.Fields(step.add), strings.Fields(step.remove))
		if err != nil {
			t.Fatal(err)
		}
		d, err := w.store.Describe(w.ctx, id)
		if err != nil || !slices.Equal(got, strings.Fields(step.want)) || !slices.Equal(d.Shares, got) {
			t.Errorf("+%q -%q: %q, described as %q (%v), want %q", step.add, step.remove, got, d.Shares, err, step.want)
		}
	}
}

func TestWhatMayNotBeSharedIsNot(t *testing.T) {
	w := newWorld(t)
	id := w.create(nil, nil, newDevice(512)).ID()
	d := newDevice(512).tiny(1, 0)
	pending := w.begin(w.plan(nil, d), nil, d).ID()
	encrypted := func(uri string) manifest.SnapshotID {
		lineage := manifest.NewLineageID()
		w.put(manifest.LineageKey(lineage), manifest.LineageRecord{
			Version: 1, ID: lineage, BlockSize: testBlock, Created: moment,
			Encryption: &manifest.Encryption{KeyURI: uri, WrappedKey: []byte("wrapped")},
		})
		outcome, err := w.store.Describe(w.ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		o := outcome.Outcome
		o.Snapshot = manifest.NewSnapshotID(lineage)
		w.put(manifest.OutcomeKey(o.Snapshot), o)
		return o.Snapshot
	}
	service, file := encrypted("awskms:///alias/x"), encrypted("file:///etc/key")
	many := make([]string, 501)
	for i := range many {
		many[i] = fmt.Sprint("account", i)
	}
	if _, err := w.store.Share(w.ctx, service, []string{"123456789012"}, nil); err != nil {
		t.Errorf("an encrypted one with an account: %v", err)
	}
	for _, c := range []struct {
		id   manifest.SnapshotID
		add  []string
		want error
	}{
		{service, []string{"all"}, snapshot.ErrNotPermitted},
		{file, []string{"123456789012"}, snapshot.ErrNotPermitted},
		{pending, []string{"123456789012"}, snapshot.ErrPending},
		{id, []string{""}, manifest.ErrAccount},
		{id, []string{"a b"}, manifest.ErrAccount},
		{id, []string{"-a"}, manifest.ErrAccount},
		{id, []string{strings.Repeat("a", 129)}, manifest.ErrAccount},
		{id, many, manifest.ErrAccount},
		{manifest.NewSnapshotID(w.lineage), []string{"a"}, snapshot.ErrNotFound},
	} {
		if _, err := w.store.Share(w.ctx, c.id, c.add, nil); !errors.Is(err, c.want) {
			t.Errorf("%s with %.20v: %v, want %v", c.id, c.add, err, c.want)
		}
	}
	if _, err := w.store.Share(w.ctx, file, nil, []string{"all"}); err != nil {
		t.Errorf("an end of sharing: %v", err)
	}
	w.wantNone(manifest.MetaKey(id), manifest.MetaKey(pending))
}

// A grant is what the snapshot refers to, and nothing else.
func TestAGrantIsWhatIsNeeded(t *testing.T) { plainAndSealed(t, testAGrantIsWhatIsNeeded) }

func testAGrantIsWhatIsNeeded(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	d := newDevice(4*testBlock).tiny(1, 0, 1, 2)
	first := w.create(nil, nil, d)
	second := d.tiny(2, 0)
	child := w.create(first, d, second)
	third := second.tiny(3, 1)
	grandchild := w.create(child, second, third)
	w.create(grandchild, third, third.tiny(4, 2))
	g, err := w.store.Grant(w.ctx, grandchild.ID())
	if err != nil {
		t.Fatal(err)
	}
	needed, beside := make(map[string]bool), make(map[string]bool)
	for key := range w.objects("") {
		for _, p := range g.Keys {
			if prefix, ok := strings.CutSuffix(p, "*"); key == p || ok && strings.HasPrefix(key, prefix) {
				needed[key] = true
			}
		}
		for _, p := range g.Owners {
			if prefix, ok := strings.CutSuffix(p, "*"); key == p || ok && strings.HasPrefix(key, prefix) {
				beside[key] = true
			}
		}
	}
	id := grandchild.ID()
	want := []string{
		manifest.PackKey(first.ID(), 0), manifest.PackKey(child.ID(), 0), manifest.PackKey(id, 0), manifest.LeavesKey(id, 0), manifest.RootKey(id),
		manifest.OutcomeKey(id), manifest.IntentKey(id), manifest.StoreKey(), manifest.LineageKey(id.Lineage),
	}
	// Sections are inherited with the leaves stream that they lie in.
	for _, ref := range grandchild.Root.Sections {
		want = append(want, manifest.LeavesKey(manifest.SnapshotID{Lineage: id.Lineage, Serial: ref.Home}, 0))
	}
	slices.Sort(want)
	want = slices.Compact(want)
	var got []string
	for key := range needed {
		got = append(got, key)
		if !beside[key] {
			t.Errorf("%s is needed, and none of its owners'", key)
		}
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("granted %q, want %q", got, want)
	}
	if g.Packs != 1 || g.Beside <= 0 || g.Foreign <= g.Beside {
		t.Errorf("beside: %d bytes of %d packs, by owners %d bytes", g.Beside, g.Packs, g.Foreign)
	}
}
