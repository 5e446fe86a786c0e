package integration

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A region is a store on a server of its own, with credentials of its own, whose URL
// says all of that.
type region struct {
	*store
	*gate
	requests, sent, received atomic.Int64 // since reset; bytes of bodies
}

// newRegion makes a region, and adds its profile to an AWS configuration file.
func newRegion(t testing.TB, name, config string) *region {
	t.Helper()
	s, g := newGatedStore(t)
	far := *s
	r := &region{store: &far, gate: g}
	target, err := url.Parse(r.endpoint)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(target)
			p.Out.Host = p.In.Host // it is signed
		},
		ModifyResponse: func(reply *http.Response) error {
			reply.Body = meter{reply.Body, &r.sent}
			return nil
		},
		Transport:    &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		r.requests.Add(1)
		request.Body = meter{request.Body, &r.received}
		proxy.ServeHTTP(w, request)
	}))
	t.Cleanup(front.Close)
	r.addProfile(t, name, config, r.server.AccessKey, r.server.SecretKey)
	r.store.url = fmt.Sprintf("s3://%s/p?region=us-east-1&endpoint=%s&profile=%s", r.bucket, url.QueryEscape(front.URL), name)
	r.store.env = environment(config)
	return r
}

func (r *region) addProfile(t testing.TB, name, config, access, secret string) {
	t.Helper()
	f, err := os.OpenFile(config, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	_, err = fmt.Fprintf(f, "[profile %s]\naws_access_key_id = %s\naws_secret_access_key = %s\n", name, access, secret)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func environment(config string) []string {
	return []string{"AWS_CONFIG_FILE=" + config, "AWS_SHARED_CREDENTIALS_FILE=/dev/null", "AWS_EC2_METADATA_DISABLED=true"}
}

// tally tells what was asked since the last one.
func (r *region) tally() string {
	return fmt.Sprintf("%d requests, %d KiB in, %d KiB out", r.requests.Swap(0), r.received.Swap(0)/kib, r.sent.Swap(0)/kib)
}

// A meter counts what is read.
type meter struct {
	io.ReadCloser
	n *atomic.Int64
}

func (m meter) Read(p []byte) (int, error) {
	n, err := m.ReadCloser.Read(p)
	m.n.Add(int64(n))
	return n, err
}

// twoRegions returns two regions, and hosts that have their stores at both.
func twoRegions(t testing.TB) (east, west *region, source, target *host) {
	t.Helper()
	config := filepath.Join(t.TempDir(), "config")
	east, west = newRegion(t, "east", config), newRegion(t, "west", config)
	source = newHost(t, east.store)
	target = newHost(t, west.store)
	return east, west, source, target
}

func TestCopyBetweenRegions(t *testing.T) {
	t.Parallel()
	east, west, source, target := twoRegions(t)
	disk := randomBytes(1, 64*mib)
	clear(disk[10*mib : 20*mib])
	image := source.image(disk)
	snap := source.ok("snapshot", "create", "--tag", "env=prod", "--description", "the disk", image)
	east.tally()
	west.tally()
	full := source.ok("snapshot", "copy", snap, "--to", west.url)
	t.Logf("full copy of 54 MiB: source %s; destination %s", east.tally(), west.tally())
	info := target.show(full)
	if info.State != "completed" || info.VolumeId != "vol-ffffffff" || len(info.Tags) != 0 || info.ParentSnapshotId != "" ||
		!strings.HasPrefix(info.Description, "[Copied "+snap+" from s3://"+east.bucket+"/p] the disk") || strings.Contains(info.Description, "profile") {
		t.Errorf("%+v", info)
	}
	sameBytes(t, "the copy", target.exported(full), disk)

	fill(newRand(2), disk[40*mib:41*mib])
	clear(disk[5*mib : 6*mib])
	writeImage(t, image, disk)
	next := source.ok("snapshot", "create", "--parent", snap, image)
	source.ok("snapshot", "tag", next, "a=b")
	before := west.dataBytes(t)
	east.tally()
	west.tally()
	begin := west.requests.Load()
	child := source.ok("snapshot", "copy", next, "--to", west.url, "--copy-tags", "--description", "mine")
	if n := west.requests.Load() - begin; n > 40 {
		t.Errorf("%d requests for two blocks", n)
	}
	if sent, received := east.sent.Load(), west.received.Load(); sent > 2*mib || received > 2*mib {
		t.Errorf("read %d bytes and wrote %d for 1 MiB", sent, received)
	}
	t.Logf("incremental copy of 1 MiB: source %s; destination %s", east.tally(), west.tally())
	info = target.show(child)
	if info.ParentSnapshotId != full || len(info.Tags) != 1 || info.Description != "mine" {
		t.Errorf("%+v", info)
	}
	if grown := west.dataBytes(t) - before; grown > 1200*kib {
		t.Errorf("it stored %d bytes", grown)
	}
	sameBytes(t, "the child's copy", target.exported(child), disk)
	source.ok("snapshot", "delete", snap, next)
	target.ok("snapshot", "delete", full)
	sameBytes(t, "the child's copy, alone", target.exported(child), disk)
	if pins := east.objects(t, "pins"); len(pins) > 0 {
		t.Errorf("pins: %v", pins)
	}
	if left := entries(t, filepath.Join(source.state, "copies")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestCopyRefusesWhatCannotBeCopied(t *testing.T) {
	t.Parallel()
	other := newDirStore(t)
	s, g := newGatedStore(t)
	h := newHost(t, s)
	image := h.image(randomBytes(1, mib))
	snap := h.ok("snapshot", "create", image)
	h.ok("snapshot", "delete", snap)
	h.fails(3, []string{"not found", "InvalidSnapshot.NotFound"}, "snapshot", "copy", snap, "--to", other.url)
	h.fails(3, []string{"not found"}, "snapshot", "copy", "snap-1a2b3c4d123456789", "--to", other.url)
	h.fails(2, []string{"malformed"}, "snapshot", "copy", "snap-1", "--to", other.url)
	h.fails(2, []string{"--to"}, "snapshot", "copy", snap)
	g.close(requests, puts("outcomes"))
	creating := h.begin("snapshot", "create", image)
	g.waitHolding(t)
	pending := h.list()[0].SnapshotId
	h.fails(4, []string{"pending", "IncorrectState"}, "snapshot", "copy", pending, "--to", other.url)
	g.open()
	if r := creating.wait(); r.code != 0 {
		t.Fatal(r)
	}
	h.fails(3, []string{"does not exist"}, "snapshot", "copy", pending, "--to", "file://"+t.TempDir()+"/none")
	h.fails(3, []string{"lazyvol init"}, "snapshot", "copy", pending, "--to", "file://"+t.TempDir())
	h.fails(2, []string{"s3://"}, "snapshot", "copy", pending, "--to", "bucket")
	if left := other.objects(t, "."); len(left) != 2 { // store.json, and the folder's lock
		t.Errorf("the refusals left %v", left)
	}
	if left := entries(t, filepath.Join(h.state, "copies")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// However a copy ends early, the same command completes it and sends no pack again.
func TestInterruptedCopyIsGoneOnWith(t *testing.T) {
	t.Parallel()
	_, west, source, target := twoRegions(t)
	disk := randomBytes(3, 120*mib) // 7.5 packs
	snap := source.ok("snapshot", "create", source.image(disk))
	last := func(n string) match {
		return func(r *http.Request) bool {
			return r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/packs/"+n)
		}
	}
	packs := func() map[string]time.Time {
		found := make(map[string]time.Time)
		for key := range west.objects(t, "data") {
			info, err := os.Stat(filepath.Join(west.files, key))
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(key, "/packs/") {
				found[key] = info.ModTime()
			}
		}
		return found
	}
	// The third pack is held, as is the first of the second run, whatever it is.
	west.close(requests, last("00000002"))
	first := source.begin("snapshot", "copy", snap, "--to", west.url)
	west.waitHolding(t)
	waitFor(t, "others are there", time.Minute, func() bool { return len(packs()) >= 2 })
	source.fails(4, []string{"another process"}, "snapshot", "copy", snap, "--to", west.url)
	first.signal(syscall.SIGKILL)
	if r := first.wait(); r.code != -1 {
		t.Fatal(r)
	}
	west.open()
	waitFor(t, "what was under way is there or not", time.Minute, func() bool { return west.holding() == 0 })
	there := packs()
	var fresh atomic.Int64
	west.close(requests, func(r *http.Request) bool { return last("")(r) && fresh.Add(1) > 1 })
	second := source.begin("snapshot", "copy", snap, "--to", west.url)
	west.waitHolding(t)
	second.signal(syscall.SIGINT)
	second.wait().failed(t, 130, "stays pending", "same command")
	west.open()
	pending := target.list()
	if len(pending) != 1 || pending[0].State != "pending" {
		t.Fatalf("%+v", pending)
	}
	west.tally()
	third := source.ok("snapshot", "copy", snap, "--to", west.url)
	t.Logf("the third run of a copy of 120 MiB: %s, packs there before: %d", west.tally(), len(there))
	if third != pending[0].SnapshotId {
		t.Errorf("made %s instead of %s", third, pending[0].SnapshotId)
	}
	after := packs()
	for key, when := range there {
		if after[key] != when {
			t.Errorf("%s was put again at %v, or removed; it was there at %v", key, after[key], when)
		}
	}
	if len(there) < 2 || len(after) > 8+1 {
		t.Errorf("%d packs, then %d", len(there), len(after))
	}
	sameBytes(t, "the copy", target.exported(third), disk)
}

func TestCopyThatIsGivenUpLeavesNothing(t *testing.T) {
	t.Parallel()
	s, g := newGatedStore(t)
	source, target := newHost(t, nil), newHost(t, s)
	source.env = s.env
	image := source.image(randomBytes(3, 20*mib))
	snap := source.ok("snapshot", "create", image)
	g.close(requests, puts("leaves"))
	r := source.begin("snapshot", "copy", snap, "--to", s.url)
	g.waitHolding(t)
	r.signal(syscall.SIGTERM)
	r.wait().failed(t, 130)
	g.open()
	target.ok("snapshot", "delete", target.list()[0].SnapshotId)
	if data := s.objects(t, "data"); len(data) > 0 {
		t.Errorf("left: %v", data)
	}
	made := source.ok("snapshot", "copy", snap, "--to", s.url) // anew
	if len(target.list()) != 1 || target.show(made).State != "completed" {
		t.Errorf("%+v", target.list())
	}
	// One whose source is gone cannot be gone on with.
	other := source.ok("snapshot", "create", "--parent", snap, source.image(randomBytes(4, 20*mib)))
	g.close(requests, puts("leaves"))
	r = source.begin("snapshot", "copy", other, "--to", s.url)
	g.waitHolding(t)
	r.signal(syscall.SIGKILL)
	r.wait()
	g.open()
	source.ok("snapshot", "delete", other)
	source.fails(3, []string{"deleted"}, "snapshot", "copy", other, "--to", s.url)
	if list := target.list(); len(list) != 1 {
		t.Errorf("%+v", list)
	}
	if left := entries(t, filepath.Join(source.state, "copies")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// Another account copies with credentials that may only read the source.
func TestCopyOfWhatMayOnlyBeRead(t *testing.T) {
	t.Parallel()
	config := filepath.Join(t.TempDir(), "config")
	east := newRegion(t, "east", config)
	disk := diskBytes(1, 24*mib)
	owner := newHost(t, east.store)
	snap := owner.ok("snapshot", "create", owner.image(disk))
	access, secret := east.server.ReadOnlyUser(t, east.bucket)
	east.addProfile(t, "reader", config, access, secret)
	theirs := *east.store
	theirs.url = strings.Replace(theirs.url, "profile=east", "profile=reader", 1)
	reader, mine := newHost(t, &theirs), newDirStore(t)
	r := reader.run("snapshot", "copy", snap, "--to", mine.url)
	if r.code != 0 || !strings.Contains(r.stderr, "not pinned") {
		t.Fatal(r)
	}
	sameBytes(t, "the copy", newHost(t, mine).exported(strings.TrimSpace(r.stdout)), disk)
	if pins := east.objects(t, "pins"); len(pins) > 0 {
		t.Errorf("pins: %v", pins)
	}
}

// A copy needs no more memory than it is given, however much there is to copy.
func TestCopyNeedsNoMoreMemoryThanItIsGiven(t *testing.T) {
	t.Parallel()
	const least = 96 * mib
	s, g := newGatedStore(t)
	h := newHost(t, nil)
	h.env = s.env
	snap := h.ok("snapshot", "create", h.image(randomBytes(5, 256*mib)))
	g.close(requests, puts("outcomes"))
	r := h.begin("snapshot", "copy", snap, "--to", s.url, "--memory=96MiB")
	g.waitHolding(t)
	peak := peakMemory(t, r.cmd.Process.Pid)
	g.open()
	if r := r.wait(); r.code != 0 {
		t.Fatal(r)
	}
	t.Logf("it took %d MiB", peak/mib)
	if peak > least+least/5 && os.Getenv("LAZYVOL_RACE") == "" { // the detector takes more than that itself
		t.Errorf("it took %d MiB of memory", peak/mib)
	}
}

// A copy can become encrypted, or change its key; what is encrypted stays so.
func TestCopyEncryptsAndNeverDecrypts(t *testing.T) {
	t.Parallel()
	plain, sealed, again := newDirStore(t), newDirStore(t), newDirStore(t)
	h := newHost(t, plain)
	sealed.damaged() // not that: but their own check runs where the keys are gone
	again.damaged()
	const secret = "attack at dawn, not at dusk"
	disk := randomBytes(1, 8*mib)
	copy(disk[mib:], strings.Repeat(secret, 1000))
	snap := h.ok("snapshot", "create", h.image(disk))
	first, second := h.ok("key", "generate", filepath.Join(h.dir, "first.key")), h.ok("key", "generate", filepath.Join(h.dir, "second.key"))
	at := func(s *store) *host {
		other := *h
		other.store = s
		return &other
	}
	encrypted := h.ok("snapshot", "copy", snap, "--to", sealed.url, "--key", first)
	kept := at(sealed).ok("snapshot", "copy", encrypted, "--to", again.url)
	changed := at(sealed).ok("snapshot", "copy", encrypted, "--to", again.url, "--key", second)
	for _, c := range []struct {
		at   *host
		snap string
		key  string
	}{{at(sealed), encrypted, first}, {at(again), kept, first}, {at(again), changed, second}} {
		info := parse[struct {
			Encrypted        bool
			KmsKeyId         string
			ParentSnapshotId string
		}](t, c.at.ok("snapshot", "show", "--json", c.snap))
		if !info.Encrypted || info.KmsKeyId != c.key || info.ParentSnapshotId != "" {
			t.Errorf("%s: %+v", c.snap, info)
		}
		sameBytes(t, "the copy", c.at.exported(c.snap), disk)
		c.at.ok("snapshot", "verify", "--all")
	}
	contains := func(s *store) bool {
		for key := range s.objects(t, ".") {
			data, err := os.ReadFile(filepath.Join(s.files, key))
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(data), secret) {
				return true
			}
		}
		return false
	}
	if !contains(plain) || contains(sealed) || contains(again) {
		t.Errorf("in clear: %v, %v, %v", contains(plain), contains(sealed), contains(again))
	}
	if err := os.Remove(filepath.Join(h.dir, "first.key")); err != nil {
		t.Fatal(err)
	}
	if r := at(sealed).run("snapshot", "copy", encrypted, "--to", plain.url, "--key", second); r.code == 0 || !strings.Contains(r.stderr, "first.key") {
		t.Errorf("%s\nwithout the source's key", r)
	}
}
