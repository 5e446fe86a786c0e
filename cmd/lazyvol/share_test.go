package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A policy names objects as long as they fit, else their owners, and is refused
// when not even those do.
func TestSharePolicyFitsOrNamesOwners(t *testing.T) {
	id := manifest.NewSnapshotID(1)
	names := func(format string, n int) (keys []string) {
		for i := range n {
			keys = append(keys, fmt.Sprintf(format, i))
		}
		return keys
	}
	small, large := names("data/snap-%017x/packs/00000000", 3), names("data/snap-%017x/packs/00000000", 400)
	for name, c := range map[string]struct {
		grant   snapshot.Grant
		byOwner bool
		refused error
	}{
		"small":     {snapshot.Grant{Keys: small, Owners: small[:1]}, false, nil},
		"large":     {snapshot.Grant{Keys: large, Owners: small, Foreign: 5 << 20}, true, nil},
		"too large": {snapshot.Grant{Keys: large, Owners: large}, true, blockstore.ErrTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			c.grant.Absent = []string{manifest.TombstoneKey(id)}
			data, byOwner, err := sharePolicy(&c.grant, id, []string{"123456789012", "someone"}, "s3://bucket/some/prefix?region=x")
			if !errors.Is(err, c.refused) || byOwner != c.byOwner {
				t.Fatalf("by owner %v, %v", byOwner, err)
			}
			if err != nil {
				return
			}
			if len(data) > blockstore.MaxPolicyLength {
				t.Errorf("%d bytes", len(data))
			}
			var policy struct {
				Statement []struct {
					Action    string
					Principal struct{ AWS []string }
					Resource  []string
					Condition map[string]map[string][]string
				}
			}
			if err := json.Unmarshal(data, &policy); err != nil {
				t.Fatal(err)
			}
			want := c.grant.Keys
			if byOwner {
				want = c.grant.Owners
			}
			read, list := policy.Statement[0], policy.Statement[1]
			if read.Action != "s3:GetObject" || len(read.Resource) != len(want) || read.Resource[0] != "arn:aws:s3:::bucket/some/prefix/"+want[0] {
				t.Errorf("read: %+v", read)
			}
			if list.Action != "s3:ListBucket" || !slices.Equal(list.Resource, []string{"arn:aws:s3:::bucket"}) ||
				!slices.Equal(list.Condition["StringEquals"]["s3:prefix"], []string{"some/prefix/" + manifest.TombstoneKey(id)}) {
				t.Errorf("list: %+v", list)
			}
			if got := read.Principal.AWS; !slices.Equal(got, []string{"arn:aws:iam::123456789012:root", "someone"}) {
				t.Errorf("principals: %q", got)
			}
			if told := strings.Join(exposed(&c.grant, byOwner), "\n"); byOwner != strings.Contains(told, "5.0 MiB of other snapshots") {
				t.Errorf("told: %s", told)
			}
		})
	}
	if _, _, err := sharePolicy(&snapshot.Grant{}, id, nil, "file:///x"); err == nil {
		t.Error("a folder has a policy")
	}
}

func TestRetentionIsDaysOrADuration(t *testing.T) {
	const day = 24 * time.Hour
	for text, want := range map[string]time.Duration{"7d": 7 * day, "0d": 0, "365d": 365 * day, "12h": 12 * time.Hour, "1s": time.Second} {
		got, err := parseRetention(text)
		if err != nil || got != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "d", "-1d", "366d", "8761h", "1ms", "7", "1.5d", "forever", "99999999999999999999d"} {
		if got, err := parseRetention(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestRetentionRules(t *testing.T) {
	for text, want := range map[string]manifest.RetainRule{
		"7d":            {Seconds: 7 * 86400},
		"none":          {},
		"env:1h":        {Tag: "env", Seconds: 3600},
		"env=prod:30d":  {Tag: "env", Value: "prod", Seconds: 30 * 86400},
		"a:b=c:d:1s":    {Tag: "a:b", Value: "c:d", Seconds: 1},
		"env=prod:none": {Tag: "env", Value: "prod"},
	} {
		if got, err := parseRule(text); err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", ":7d", "=x:7d", "env=prod", "0d", "env:0s", "env:8 days"} {
		if got, err := parseRule(text); !errors.Is(err, errUsage) {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	var p manifest.Policy
	setRule(&p, manifest.RetainRule{Seconds: 5})
	setRule(&p, manifest.RetainRule{Tag: "a", Seconds: 6})
	setRule(&p, manifest.RetainRule{Seconds: 7})
	setRule(&p, manifest.RetainRule{Tag: "a"})
	if !slices.Equal(p.Retain, []manifest.RetainRule{{Seconds: 7}}) {
		t.Errorf("%+v", p.Retain)
	}
}
