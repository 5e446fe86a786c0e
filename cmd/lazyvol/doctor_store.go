package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

const (
	// reachTime bounds the first requests, which the other checks wait for. Each has a
	// limit of its own, of 15 s.
	reachTime = 35 * time.Second

	// S3 refuses requests that were signed 15 minutes before or after its own time.
	refusedSkew = 15 * time.Minute
	failedSkew  = 10 * time.Minute
	doubtedSkew = time.Minute

	// slowRequest is from when a small request is worth a word: the background needs
	// more of them under way than it has to be quick.
	slowRequest = 500 * time.Millisecond
)

// A storeExam is the examination of the store that the command line names. What the
// first requests tell is shared by its checks.
type storeExam struct {
	url    string
	first  func() storeFacts
	bucket func() bucketFacts // after first, if its facts are usable
}

// storeFacts are what the first requests told.
type storeFacts struct {
	url     string
	unmade  bool  // the default store, which is made on first use
	opened  error // of understanding the URL and finding credentials
	reached error // of a listing
	contact blockstore.Contact
	format  error // of reading the store's record
	id      string

	objects blockstore.Store // nil if it could not be opened
}

func newStoreExam(a *app) *storeExam {
	s := &storeExam{url: cmp.Or(a.storeURL, a.defaultStore())}
	isDefault := s.url == a.defaultStore()
	s.first = sync.OnceValue(func() storeFacts {
		ctx, cancel := context.WithTimeout(context.Background(), reachTime)
		defer cancel()
		return gatherStore(ctx, s.url, isDefault)
	})
	s.bucket = sync.OnceValue(func() bucketFacts {
		ctx, cancel := context.WithTimeout(context.Background(), storeCheckTime-reachTime)
		defer cancel()
		return gatherBucket(ctx, s.first().objects)
	})
	return s
}

func gatherStore(ctx context.Context, at string, isDefault bool) storeFacts {
	f := storeFacts{url: at}
	if isDefault {
		if u, err := url.Parse(at); err == nil {
			_, err = os.Stat(u.Path)
			f.unmade = errors.Is(err, fs.ErrNotExist)
		}
	}
	if f.unmade {
		return f
	}
	if f.objects, f.opened = blockstore.Open(ctx, at); f.opened != nil {
		return f
	}
	f.url = f.objects.String() // without secrets
	f.contact, f.reached = blockstore.Reach(ctx, f.objects)
	if f.reached == nil { // connected by now
		f.contact, f.reached = blockstore.Reach(ctx, f.objects)
	}
	if f.reached == nil || errors.Is(f.reached, blockstore.ErrDenied) { // that it may not list is no reason
		f.id, f.format = snapshot.New(f.objects).ID(ctx)
	}
	return f
}

// answered reports whether requests are answered, with whatever.
func (f storeFacts) answered() bool {
	return f.opened == nil && !f.unmade && (f.reached == nil || !f.contact.Date.IsZero() || errors.Is(f.reached, blockstore.ErrDenied))
}

// elsewhere reports whether requests are for another region than the bucket's.
func (f storeFacts) elsewhere() bool {
	return f.contact.Region != "" && f.contact.Region != f.contact.Signed
}

// skew is by how much this host's clock is ahead of the store's, if that tells. Its
// date was cut to a second, at some moment while the request was under way.
func (f storeFacts) skew() time.Duration {
	if f.contact.Date.IsZero() {
		return 0
	}
	return f.contact.Asked.Add(f.contact.Took / 2).Sub(f.contact.Date.Add(time.Second / 2))
}

// usable reports whether more can be asked.
func (f storeFacts) usable() bool { return f.objects != nil && f.reached == nil }

// unusable skips what cannot be asked of a store that is not usable.
func (f storeFacts) unusable() finding {
	switch {
	case f.unmade:
		return skip("there is no store yet")
	case f.opened != nil:
		return skip("the store cannot be opened")
	case f.answered():
		return skip("the store refuses to be listed")
	}
	return skip("the store does not answer")
}

func (s *storeExam) store(context.Context) finding { return judgeStore(s.first()) }

func judgeStore(f storeFacts) finding {
	switch {
	case f.unmade:
		return fine("%s is not there yet; the first command that needs it makes it", f.url)
	case errors.Is(f.opened, blockstore.ErrDenied):
		return skip("%s cannot be asked without credentials", f.url)
	case f.opened != nil:
		return fail("write it as s3://bucket/prefix?region=…&endpoint=…&profile=… or file:///path; see docs/s3.md", "%v", f.opened)
	case errors.Is(f.reached, blockstore.ErrNoStore):
		return fail("make the bucket or the folder first, or correct --store or LAZYVOL_STORE", "%v", f.reached)
	case errors.Is(f.reached, blockstore.ErrUnavailable):
		return fail("check the address (AWS_ENDPOINT_URL, ?endpoint=), the network and proxies (HTTPS_PROXY); what is cached goes on working meanwhile", "%v", f.reached)
	case errors.Is(f.reached, blockstore.ErrDenied), f.reached != nil && f.elsewhere():
		return fine("%s answers, and refuses: see below", f.url)
	case f.reached != nil:
		return fail("see what the error says", "%v", f.reached)
	case f.contact.Took >= slowRequest:
		return warn("use a store that is nearer, or a trace and more --read-ahead: see docs/performance.md", "%s answers in %d ms, which is slow", f.url, f.contact.Took.Milliseconds())
	}
	return fine("%s answers in %d ms", f.url, f.contact.Took.Milliseconds())
}

func (s *storeExam) credentials(context.Context) finding { return judgeCredentials(s.first()) }

func judgeCredentials(f storeFacts) finding {
	who := fmt.Sprintf("access key %s of %s", f.contact.AccessKey, f.contact.Source)
	switch {
	case f.objects != nil && f.contact.AccessKey == "":
		if errors.Is(f.reached, blockstore.ErrDenied) {
			return fail("give the user rights to the folder", "%v", f.reached)
		}
		return skip("a folder needs none")
	case errors.Is(f.opened, blockstore.ErrDenied):
		return fail("set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role; under sudo, in units and for daemons, too", "%v", f.opened)
	case !f.answered():
		return f.unusable()
	case f.reached == nil:
		return fine("%s", who)
	case f.format == nil && f.id != "": // else it was not asked
		return warn("for more let them list the bucket: see docs/s3.md", "%s may read the store and not list it: snapshots that are shared with it can be mounted by their ids", who)
	case f.skew().Abs() >= failedSkew:
		return skip("requests are refused, perhaps for the clock alone")
	case errors.Is(f.reached, blockstore.ErrDenied):
		return fail("check that the key is right and not expired, and what it may do: docs/s3.md has the least policies", "%s is refused: %v", who, f.reached)
	}
	return skip("%s was not tried", who)
}

func (s *storeExam) clock(context.Context) finding { return judgeClock(s.first()) }

func judgeClock(f storeFacts) finding {
	if f.contact.Date.IsZero() {
		return skip("the store tells no time")
	}
	skew := f.skew()
	ahead := "ahead of"
	if skew < 0 {
		ahead = "behind"
	}
	const mend = "set the clock: 'timedatectl set-ntp true', or chronyd"
	switch off := skew.Abs(); {
	case off >= failedSkew:
		return fail(mend, "this host is %s %s the store, and S3 refuses requests from %s on", off.Round(time.Second), ahead, refusedSkew)
	case off >= doubtedSkew:
		return warn(mend, "this host is %s %s the store: times that are shown are wrong, and from %s on S3 refuses requests", off.Round(time.Second), ahead, refusedSkew)
	}
	return fine("within a minute of the store's")
}

func (s *storeExam) region(context.Context) finding { return judgeRegion(s.first()) }

func judgeRegion(f storeFacts) finding {
	here, want := f.contact.Signed, f.contact.Region
	switch {
	case want == "":
		return skip("the store tells none")
	case f.elsewhere():
		return fail(fmt.Sprintf("add ?region=%s to the store's URL, or set AWS_REGION=%s", want, want), "the bucket is in %s, and requests are for %s", want, here)
	}
	return fine("%s", want)
}

func (s *storeExam) format(context.Context) finding { return judgeFormat(s.first()) }

func judgeFormat(f storeFacts) finding {
	switch {
	case f.format == nil && f.id == "":
		return f.unusable()
	case errors.Is(f.format, snapshot.ErrNotStore):
		return fail("'lazyvol init' makes one; if there should be one, correct the bucket and the prefix", "there is no store of lazyvol at %s", f.url)
	case errors.Is(f.format, blockstore.ErrDenied):
		return skip("the store may not be read")
	case f.format != nil:
		return fail("if it names a newer version, upgrade lazyvol (docs/upgrade.md); if it is damaged, bring store.json back from another copy", "%v", f.format)
	}
	return fine("store %s", f.id)
}

// writeFacts are what came of writing to the store.
type writeFacts struct {
	remove error // of an object that is not there
	match  error // of a put that must fail, with If-Match on that; only if remove was denied
	probe  error // else: of everything
}

func (s *storeExam) writes(ctx context.Context) finding {
	f := s.first()
	if !f.usable() {
		return f.unusable()
	}
	// Who may not remove objects would leave those of the probe.
	var w writeFacts
	absent := "probe/" + rand.Text()
	if w.remove = f.objects.Delete(ctx, absent); denied(w.remove) {
		_, w.match = f.objects.Put(ctx, absent, nil, blockstore.IfMatch(strings.Repeat("0", 32)))
	} else if w.remove == nil {
		w.probe = blockstore.Probe(ctx, blockstore.Retry(f.objects, blockstore.RetryPolicy{Total: storeCheckTime / 4}))
	}
	return judgeWrites(w)
}

func denied(err error) bool { return isAny(err, blockstore.ErrDenied, fs.ErrPermission) }

func judgeWrites(w writeFacts) finding {
	const readOnly = "if this host shall make snapshots, let it write: docs/s3.md has the policy"
	const unsafe = "use another server, or a newer one: hosts would lose each other's snapshots (docs/s3.md)"
	switch {
	case denied(w.remove) && errors.Is(w.match, blockstore.ErrChanged):
		return fine("may write and not delete; If-Match is honoured (the rest is not tried: nobody would remove its objects)")
	case denied(w.remove) && w.match == nil:
		return fail(unsafe, "the store ignores If-Match")
	case denied(w.remove) && denied(w.match), denied(w.probe):
		return warn(readOnly, "it may be read and not written to: snapshots can be mounted, and not made or deleted")
	case w.remove != nil || w.match != nil:
		return fail("see what the error says", "%v", cmp.Or(w.match, w.remove))
	case isAny(w.probe, blockstore.ErrUnavailable, context.DeadlineExceeded):
		return fail("try again; if it stays, see the server's log", "%v", w.probe)
	case w.probe != nil:
		return fail(unsafe, "%v", w.probe)
	}
	return fine("conditional puts are honoured")
}

// bucketFacts are what a bucket does with objects by itself.
type bucketFacts struct {
	versioned    bool
	versions     error // of asking
	lifecycle    blockstore.Lifecycle
	lifecycleErr error
}

func gatherBucket(ctx context.Context, objects blockstore.Store) (f bucketFacts) {
	f.versioned, f.versions = blockstore.Versioned(ctx, objects)
	f.lifecycle, f.lifecycleErr = blockstore.LifecycleOf(ctx, objects)
	return f
}

func (s *storeExam) versions(context.Context) finding {
	f := s.first()
	if !f.usable() {
		return f.unusable()
	}
	return judgeVersions(s.bucket())
}

func judgeVersions(f bucketFacts) finding {
	const mend = "add a lifecycle rule that expires noncurrent versions (docs/s3.md), or suspend versioning"
	switch {
	case f.versions != nil:
		return skip("whether the bucket is versioned may not be asked, or is not known")
	case f.versioned && f.lifecycleErr != nil:
		return warn(mend, "the bucket is versioned, and whether old versions expire may not be asked: what is deleted may cost for ever")
	case f.versioned && !f.lifecycle.ExpiresOld:
		return warn(mend, "the bucket is versioned, and old versions never expire: what is deleted frees nothing")
	case f.versioned:
		return fine("the bucket is versioned, and old versions expire")
	}
	return fine("the bucket keeps no old versions")
}

func (s *storeExam) lifecycle(context.Context) finding {
	f := s.first()
	if !f.usable() {
		return f.unusable()
	}
	return judgeLifecycle(s.bucket())
}

func judgeLifecycle(f bucketFacts) finding {
	switch {
	case f.lifecycleErr != nil:
		return skip("the bucket's lifecycle may not be asked, or is not known")
	case len(f.lifecycle.Harms) > 0:
		return fail("remove it, or let it be for another prefix: snapshots need all of their objects, however old", "%s", strings.Join(f.lifecycle.Harms, "; "))
	}
	return fine("no rule removes objects of the store")
}

// examineKey draws a data key, which is stored nowhere.
func (a *app) examineKey(c *cobra.Command) func(context.Context) finding {
	return func(ctx context.Context) finding {
		uri, from := a.keyURI(c)
		if uri == "" {
			return skip("%s is not set: what is new is not encrypted", keyEnv)
		}
		plain, _, _, err := a.keys.Generate(ctx, uri, manifest.LineageID(0).String())
		clear(plain)
		return judgeKey(uri, from, err)
	}
}

func judgeKey(uri string, from origin, err error) finding {
	switch {
	case err == nil:
		return fine("%s can be used", uri)
	case errors.Is(err, crypt.ErrKeyURI):
		return fail("write it as file:///path or awskms:///key-or-alias", "%s: %v", from, err)
	case errors.Is(err, crypt.ErrKeyNotFound), errors.Is(err, fs.ErrNotExist):
		return fail("put the key file there (a copy of it, not a new one), or name a key that exists", "%v", err)
	case errors.Is(err, crypt.ErrKeyDenied), errors.Is(err, fs.ErrPermission):
		return fail("a key file must be its user's and 'chmod 600'; of KMS, kms:GenerateDataKey and kms:Decrypt are needed", "%v", err)
	case errors.Is(err, crypt.ErrKeyDisabled):
		return fail("enable the key in KMS", "%v", err)
	case errors.Is(err, crypt.ErrKeyUnavailable):
		return fail("check the network and KMS's endpoint", "%v", err)
	}
	return fail("see docs/encryption.md", "%v", err)
}
