package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

// fence returns the content of a fenced block of a page of the documentation, by what
// follows the fence.
func fence(t testing.TB, page, info string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "docs", page))
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile("(?s)\n```" + regexp.QuoteMeta(info) + "\n(.*?)\n```").FindSubmatch(data)
	if found == nil {
		t.Fatalf("docs/%s has no block %q", page, info)
	}
	return string(found[1])
}

// iamPolicy is a policy as an identity has it. As a bucket's it names the account.
type iamPolicy struct {
	Version   string
	Statement []iamStatement
}

type iamStatement struct {
	Effect           string
	Principal        map[string][]string `json:",omitempty"`
	Action, Resource []string
	Condition        map[string]map[string]any `json:",omitempty"`
}

// forBucket returns the policy for an account of another bucket than the page's.
func (p iamPolicy) forBucket(t testing.TB, bucket, account string) string {
	t.Helper()
	p.Statement = slices.Clone(p.Statement)
	for i := range p.Statement {
		p.Statement[i].Principal = map[string][]string{"AWS": {account}}
	}
	data, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(data), ":my-bucket", ":"+bucket)
}

// A line is a part of a policy that can be left out: an action of a statement, with all
// or with one of its resources.
type line struct{ action, resource string }

// lines are the lines of a policy. A statement of several actions has few resources.
func (p iamPolicy) lines() (all []line) {
	for _, s := range p.Statement {
		for _, action := range s.Action {
			for _, resource := range s.Resource {
				all = append(all, line{action, resource})
			}
		}
	}
	return all
}

// without returns the policy without a line.
func (p iamPolicy) without(l line) iamPolicy {
	var left []iamStatement
	for _, s := range p.Statement {
		for _, action := range s.Action {
			part := s
			part.Action = []string{action}
			part.Resource = slices.DeleteFunc(slices.Clone(s.Resource), func(r string) bool { return action == l.action && r == l.resource })
			if len(part.Resource) > 0 {
				left = append(left, part)
			}
		}
	}
	p.Statement = left
	return p
}

// A ward is a store with snapshots, and a host whose account may do what a policy says.
type ward struct {
	*host
	snap, image string
	dir         string // to mount on

	volume, blank string // that it made
}

// newWard makes a store in a bucket of its own.
func newWard(t *testing.T, server *blockstoretest.S3Server, policy iamPolicy) *ward {
	t.Helper()
	bucket := server.NewBucket(t)
	s := &store{url: server.URL(bucket, "disks"), env: server.Env(), server: server, bucket: bucket}
	root := newHost(t, s)
	root.ok("init")
	access, secret := server.NewUser(t)
	server.SetPolicy(t, bucket, policy.forBucket(t, bucket, access))
	w := &ward{host: newHost(t, s), dir: t.TempDir()}
	w.env = server.EnvFor(access, secret)
	w.image = root.image(diskBytes(1, 2*mib))
	w.snap = root.ok("snapshot", "create", w.image)
	return w
}

// A deed is what a host does with its store. Some need what others made before.
type deed struct {
	name  string
	after []string
	do    func(*ward) result
}

// deeds are all of them, in an order in which each finds what it needs.
var deeds = []deed{
	{"init", nil, func(w *ward) result { return w.run("init") }},
	{"list", nil, func(w *ward) result { return w.run("snapshot", "list") }},
	{"show", nil, func(w *ward) result { return w.run("snapshot", "show", w.snap) }},
	{"events", nil, func(w *ward) result { return w.run("events") }},
	{"verify", nil, func(w *ward) result { return w.run("snapshot", "verify", w.snap) }},
	{"export", nil, func(w *ward) result { return w.run("snapshot", "export", w.snap, filepath.Join(w.t.TempDir(), "out")) }},
	{"mount", nil, func(w *ward) result { return w.touch(w.snap) }},
	{"create", nil, func(w *ward) result { return w.run("snapshot", "create", w.image) }},
	{"increment", nil, func(w *ward) result { return w.run("snapshot", "create", "--parent", w.snap, w.image) }},
	{"trace", nil, func(w *ward) result {
		if r := w.touch(w.snap, "--record-trace", "boot"); r.code != 0 {
			return r
		}
		return w.touch(w.snap, "--trace", "boot")
	}},
	{"volume", nil, func(w *ward) result {
		r := w.run("volume", "create", "--snapshot", w.snap)
		w.volume = strings.TrimSpace(r.stdout)
		return r
	}},
	{"blank volume", nil, func(w *ward) result {
		r := w.run("volume", "create", "--size", "1MiB")
		w.blank = strings.TrimSpace(r.stdout)
		return r
	}},
	{"snapshot of a volume", []string{"volume"}, func(w *ward) result {
		if r := w.run("mount", w.volume, w.dir); r.code != 0 {
			return r
		}
		m := w.mounted(w.dir)
		m.write([]byte("changed"), 0)
		r := w.run("snapshot", "create", w.volume)
		m.unmount()
		return r
	}},
	{"set", []string{"volume", "blank volume"}, func(w *ward) result { return w.run("snapshot", "create", w.volume, w.blank) }},
	{"copy", nil, func(w *ward) result { return w.run("snapshot", "copy", w.snap, "--to", w.store.url) }},
	{"delete a volume", []string{"volume"}, func(w *ward) result { return w.run("volume", "delete", w.volume) }},
	{"tag", nil, func(w *ward) result { return w.run("snapshot", "tag", w.snap, "a=b") }},
	{"lock", nil, func(w *ward) result { return w.run("snapshot", "lock", w.snap, "--mode", "governance", "--days", "1") }},
	{"unlock", []string{"lock"}, func(w *ward) result { return w.run("snapshot", "unlock", w.snap) }},
	{"policy", nil, func(w *ward) result { return w.run("policy", "set", "--retain", "env=prod:1d") }},
	{"delete", nil, func(w *ward) result { return w.run("snapshot", "delete", w.snap) }},
	{"gc", nil, func(w *ward) result { return w.run("gc") }},
	{"doctor", nil, func(w *ward) result { return w.diagnosed("store", "credentials", "format") }},
	{"doctor on versions", nil, func(w *ward) result { return w.diagnosed("versions") }},
	{"doctor on writes", nil, func(w *ward) result { return w.diagnosed("writes") }},
}

// touch mounts a snapshot, reads from it and unmounts it.
func (w *ward) touch(snap string, flags ...string) result {
	w.t.Helper()
	if r := w.run(append(append([]string{"mount", "--no-hydrate"}, flags...), snap, w.dir)...); r.code != 0 {
		return r
	}
	m := w.mounted(w.dir)
	m.read(0, 4096)
	return w.run("unmount", w.dir)
}

// diagnosed is how the doctor ends if it is to find some checks ok.
func (w *ward) diagnosed(checks ...string) result {
	w.t.Helper()
	r := w.run("doctor", "--json")
	for _, e := range parse[struct{ Checks []examined }](w.t, r.stdout).Checks {
		if slices.Contains(checks, e.Check) && e.Result != "ok" {
			return result{args: r.args, code: 1, stderr: e.Message}
		}
	}
	return result{args: r.args}
}

// perform does a deed and what has to be done before, and returns how it ended, or what
// before it failed.
func (w *ward) perform(name string) result {
	w.t.Helper()
	d := deeds[slices.IndexFunc(deeds, func(d deed) bool { return d.name == name })]
	for _, before := range d.after {
		if r := w.perform(before); r.code != 0 {
			return r
		}
	}
	return d.do(w)
}

// pagePolicy is a policy of docs/s3.md, what it is to allow and to refuse, and by what
// deed it shows that a line is needed.
type pagePolicy struct {
	name    string
	refused []string
	needed  map[line]string
	untold  []line // of which this server, or these deeds, cannot tell that they are needed
}

func pagePolicies() []pagePolicy {
	const bucket = "arn:aws:s3:::my-bucket"
	at := func(action, key string) line { return line{"s3:" + action, bucket + "/disks/" + key} }
	list, get := line{"s3:ListBucket", bucket}, at("GetObject", "*")
	return []pagePolicy{
		{
			name:    "full",
			refused: nil,
			needed: map[line]string{
				list: "list", get: "show", at("PutObject", "*"): "create", at("DeleteObject", "*"): "delete",
				{"s3:GetBucketVersioning", bucket}: "doctor on versions",
			},
			untold: []line{{"s3:GetLifecycleConfiguration", bucket}},
		},
		{
			name: "read",
			refused: []string{
				"init", "create", "increment", "trace", "volume", "blank volume", "snapshot of a volume", "set", "copy", "delete a volume",
				"tag", "lock", "unlock", "policy", "delete", "doctor on versions", "doctor on writes",
			},
			needed: map[line]string{list: "list", get: "show"},
		},
		{
			name:    "append",
			refused: []string{"tag", "lock", "unlock", "policy", "delete", "doctor on versions"},
			needed: map[line]string{
				list: "list", get: "show",
				at("PutObject", "data/*"): "create", at("PutObject", "intents/*"): "create", at("PutObject", "lineages/*"): "create",
				at("PutObject", "outcomes/*"): "create", at("PutObject", "sets/*"): "set", at("PutObject", "traces/*"): "trace",
				at("PutObject", "pins/*"): "volume", at("PutObject", "probe/*"): "doctor on writes",
				at("DeleteObject", "pins/*"): "delete a volume", at("DeleteObject", "probe/*"): "init",
			},
			untold: []line{at("PutObject", "events/*"), at("PutObject", "progress/*"), at("DeleteObject", "progress/*")},
		},
	}
}

func (p pagePolicy) read(t *testing.T) (policy iamPolicy) {
	t.Helper()
	if err := json.Unmarshal([]byte(fence(t, "s3.md", "json policy-"+p.name)), &policy); err != nil {
		t.Fatal(err)
	}
	return policy
}

// The policies of docs/s3.md let a host do what they are for, and nothing else, and none
// of their lines is superfluous.
func TestPoliciesOfThePageAreTheLeast(t *testing.T) {
	t.Parallel()
	for _, p := range pagePolicies() {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			server := blockstoretest.StartVersitygw(t)
			policy := p.read(t)
			newWard(t, server, policy).keepsTo(p)
			for _, l := range policy.lines() {
				if slices.Contains(p.untold, l) {
					continue
				}
				deed := p.needed[l]
				if deed == "" {
					t.Errorf("nothing shows that %v is needed", l)
				} else if r := newWard(t, server, policy.without(l)).perform(deed); r.code == 0 {
					t.Errorf("without %v: %s", l, r)
				}
			}
			if len(p.untold) == 0 {
				return
			}
			for _, l := range p.untold {
				policy = policy.without(l)
			}
			newWard(t, server, policy).keepsTo(p) // else they could be told after all
		})
	}
}

// keepsTo checks that all deeds are allowed but for those that the policy refuses.
func (w *ward) keepsTo(p pagePolicy) {
	w.t.Helper()
	for _, d := range deeds {
		refused := slices.Contains(p.refused, d.name)
		if refused && len(d.after) > 0 && slices.Contains(p.refused, d.after[0]) {
			continue // there is nothing to do it with
		}
		r := d.do(w)
		if (r.code != 0) != refused {
			w.t.Errorf("%s: %s\nwant it refused: %v", d.name, r, refused)
		}
		// The doctor has its own words, and a trace that cannot be saved is a warning.
		if refused && !strings.Contains(r.stderr, "denied") && !strings.HasPrefix(d.name, "doctor") && d.name != "trace" {
			w.t.Errorf("%s: %s\nwant it denied", d.name, r)
		}
	}
}

// The statement for AWS alone is about the keys that the policy before it lets a host
// write once.
func TestStatementForAWSGoesWithItsPolicy(t *testing.T) {
	var deny struct {
		Effect, Action string
		Resource       []string
	}
	if err := json.Unmarshal([]byte(fence(t, "s3.md", "json policy-append-aws")), &deny); err != nil {
		t.Fatal(err)
	}
	var policy iamPolicy
	if err := json.Unmarshal([]byte(fence(t, "s3.md", "json policy-append")), &policy); err != nil {
		t.Fatal(err)
	}
	var once []string
	for _, s := range policy.Statement {
		if slices.Equal(s.Action, []string{"s3:PutObject"}) {
			once = slices.DeleteFunc(slices.Clone(s.Resource), func(r string) bool { return strings.Contains(r, "/traces/") })
		}
	}
	if deny.Effect != "Deny" || deny.Action != "s3:PutObject" || !slices.Equal(deny.Resource, once) {
		t.Errorf("%+v\nwant %v", deny, once)
	}
}
